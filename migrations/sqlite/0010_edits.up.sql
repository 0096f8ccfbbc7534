-- The log may have events of the kind 'edited', and bulk operations may edit. Versions that can't read them are kept away by this number.
SELECT 1;
