# Is the database alive? Starts PostgreSQL from the recovered disks and compares pgbench's sums, which every
# transaction changes by the same amount. Runs in the recovery guest with the file systems mounted.
set -eu
data=/mnt/disk0/postgresql wal=/mnt/disk1/wal
programs=$(ls -d /usr/lib/postgresql/*/bin | tail -n 1)
rm -f "$data/postmaster.pid"
rm -f "$data/pg_wal" # leads to where the source has the log mounted
ln -s "$wal" "$data/pg_wal"
chown -R postgres:postgres "$data" "$wal"
chmod 755 /mnt /mnt/disk0 /mnt/disk1
mkdir -p /run/database
chown postgres:postgres /run/database
as_postgres() { su -s /bin/sh postgres -c "$1"; }
as_postgres "$programs/postgres -D $data -c unix_socket_directories=/run/database -c listen_addresses= -c shared_buffers=32MB -c shared_memory_type=mmap -c dynamic_shared_memory_type=mmap" >/run/database/log 2>&1 &
ask() { as_postgres "$programs/psql -X -A -t -h /run/database -U postgres -d postgres -c \"$1\""; }
tries=0
until ask 'SELECT 1' >/dev/null 2>&1; do
    tries=$((tries + 1))
    [ "$tries" -lt 120 ] || { tail -n 20 /run/database/log; exit 1; }
    sleep 1
done
sums=$(ask 'SELECT (SELECT coalesce(sum(abalance), 0) FROM pgbench_accounts), (SELECT coalesce(sum(tbalance), 0) FROM pgbench_tellers), (SELECT coalesce(sum(bbalance), 0) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history), (SELECT count(*) FROM pgbench_history)')
as_postgres "$programs/pg_ctl -D $data -m fast -w stop" >/dev/null
echo "$sums" | awk -F '|' '
    $1 == $2 && $2 == $3 && $3 == $4 { printf "PostgreSQL starts; the sums of all balances agree (%s) after %s transactions\n", $1, $5; good = 1 }
    END { if (!good) { print "the sums of pgbench differ: " $0; exit 1 } }'
