-- loses: which workers were heard of lately
DROP TABLE worker;
