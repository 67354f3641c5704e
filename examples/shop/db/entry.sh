#!/bin/sh
# Makes the database at the first start, then becomes it. Making happens
# beside and is renamed at the end: an interrupted start leaves nothing half
# done.
set -eu
if [ ! -e "$PGDATA/PG_VERSION" ]; then
	rm -rf "$PGDATA.new"
	initdb --pgdata="$PGDATA.new" --username="$PGUSER" --pwfile="$PASSWORD_FILE" \
		--auth=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8
	echo 'host all all all scram-sha-256' >>"$PGDATA.new/pg_hba.conf"
	echo "create database $PGDATABASE" | postgres --single -D "$PGDATA.new" postgres
	mv "$PGDATA.new" "$PGDATA"
fi
# A volume's group may have been given more than PostgreSQL accepts.
chmod 0700 "$PGDATA"
exec postgres -D "$PGDATA" -c listen_addresses='*' -c jit=off \
	-c unix_socket_directories=/run/postgresql "$@"
