-- loses: bulk operations, and with them those that are under way
DROP TABLE jobledger.bulk_operation;
