# rows METHOD [ROW] asks the database for all rows, and with POST adds one.
rows() {
	address=$(nslookup "$DATABASE" | sed -n '/^Name/,$ s/^Address[^:]*: *//p' | head -n 1)
	printf '%s /cgi-bin/rows HTTP/1.0\r\nAuthorization: Basic %s\r\nContent-Length: %s\r\n\r\n%s' \
		"$1" "$(printf %s "$DATABASE_USER:$DATABASE_PASSWORD" | base64 -w 0)" "${#2}" "$2" | timeout 5 nc "$address" 80
}
