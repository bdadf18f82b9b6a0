# Run by the recovery guest: PostgreSQL starts from disk 0, its write-ahead log on disk 1, and
# pgbench's balances agree. The file systems are writable copies; what is changed here stays here.
set -e
data=/mnt/disk0/postgresql wal=/mnt/disk1/wal
[ -f "$data/PG_VERSION" ] || { echo "disk 0 holds no database"; exit 2; }
[ -d "$wal" ] || { echo "disk 1 holds no write-ahead log"; exit 2; }
version=$(head -c 16 "$data/PG_VERSION")
case $version in
'' | *[!0-9]*) echo "disk 0 tells no version of PostgreSQL"; exit 2 ;;
esac
programs=/usr/lib/postgresql/$version/bin
owner=$(stat -c %u "$data") group=$(stat -c %g "$data")

rm -f "$data/pg_wal" "$data/postmaster.pid" # the link leads to a mount of the source
ln -s "$wal" "$data/pg_wal"
mkdir -p /tmp/socket
chown "$owner:$group" /tmp/socket

/usr/bin/setpriv --reuid "$owner" --regid "$group" --clear-groups -- "$programs/postgres" -D "$data" \
    -c listen_addresses= -c unix_socket_directories=/tmp/socket \
    -c dynamic_shared_memory_type=mmap -c shared_buffers=16MB -c jit=off -c autovacuum=off \
    >/tmp/server.log 2>&1 &
server=$!
until "$programs/pg_isready" -q -h /tmp/socket -d postgres; do
    kill -0 $server 2>/dev/null || { tail -n 20 /tmp/server.log; echo "PostgreSQL does not start"; exit 3; }
    sleep 0.2
done
sums=$("$programs/psql" -XAtq -F ' ' -h /tmp/socket -U postgres -c "SELECT
 (SELECT coalesce(sum(abalance), 0) FROM pgbench_accounts),
 (SELECT coalesce(sum(tbalance), 0) FROM pgbench_tellers),
 (SELECT coalesce(sum(bbalance), 0) FROM pgbench_branches),
 (SELECT coalesce(sum(delta), 0) FROM pgbench_history),
 (SELECT count(*) FROM pgbench_history)")
kill -INT $server
wait $server || true
set -- $sums
echo "accounts $1, tellers $2, branches $3, history $4; $5 transactions"
[ "$1" = "$2" ] && [ "$2" = "$3" ] && [ "$3" = "$4" ] || { echo "the balances differ"; exit 4; }
