-- loses: bulk operations, and with them those that are under way
DROP TABLE bulk_operation;
