#!/bin/sh
# Run once by PostgreSQL's image, when it makes its database: the owner of the ledger, and the role that servers use.
set -eu
psql --username "${POSTGRES_USER:-postgres}" --set ON_ERROR_STOP=1 --set owner="$OWNER_PASSWORD" --set server="$SERVER_PASSWORD" <<'SQL'
CREATE ROLE jobledger_owner LOGIN PASSWORD :'owner';
CREATE ROLE jobledger_server LOGIN PASSWORD :'server';
CREATE DATABASE ledger OWNER jobledger_owner ENCODING 'UTF8' LOCALE 'C' TEMPLATE template0;
SQL
