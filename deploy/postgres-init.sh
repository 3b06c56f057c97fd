#!/bin/sh
# Runs once, when the volume of PostgreSQL is empty: the service's own role, which is no superuser, and its database.
set -eu
psql -v ON_ERROR_STOP=1 -U "$POSTGRES_USER" -d postgres -v password="$LUTHIER_ROLE_PASSWORD" <<'SQL'
CREATE ROLE luthier LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD :'password';
CREATE DATABASE luthier OWNER luthier;
SQL
