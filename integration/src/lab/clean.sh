# Removes one Lab: its processes (whatever runs in its namespaces), namespaces, control groups, sockets and files.
# Arguments: the Lab's id, its folder. Safe to run twice, and at the same time as another copy of itself.
shopt -s nullglob
id=$1 folder=$2
[ -n "$id" ] && [ -n "$folder" ] || exit 2

for _ in $(seq 200); do
    namespaces=(/run/netns/"$id"-*)
    [ ${#namespaces[@]} -gt 0 ] || break
    match=()
    for inode in $(stat -c %i "${namespaces[@]}" 2>/dev/null); do
        match+=(-o -inum "$inode")
    done
    # /proc/PID/ns/net, followed, is the namespace itself, so equal inodes mean a process inside.
    pids=$(find -L /proc/[0-9]*/ns/net -maxdepth 0 \( -false "${match[@]}" \) 2>/dev/null | cut -d/ -f3)
    if [ -z "$pids" ]; then
        umount -l "${namespaces[@]}" 2>/dev/null
        rm -f "${namespaces[@]}"
        break
    fi
    kill -9 $pids 2>/dev/null
    sleep 0.01
done

# Nodes of clusters have control groups, which are empty once the last of their processes is reaped.
for _ in $(seq 500); do
    groups=(/sys/fs/cgroup/*/meshd-lab-"$id"-*)
    [ ${#groups[@]} -gt 0 ] || break
    kill -9 $(find "${groups[@]}" -name cgroup.procs -exec cat {} + 2>/dev/null) 2>/dev/null
    find "${groups[@]}" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.01
done

# Interfaces of userspace WireGuard leave a socket in a folder that all namespaces share.
if [ -e "$folder/interfaces" ]; then
    while read -r interface; do
        rm -f "/var/run/wireguard/$interface.sock"
    done <"$folder/interfaces"
fi
rm -rf "$folder"
