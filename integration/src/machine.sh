# Boots systemd on a copy of this machine's files that is written to memory only, in the network namespace that this runs
# in. Arguments: a folder for the mounts, the machine's name, a name for its control group.
set -e
folder=$1 name=$2 group=$3

if [ "${4-}" != inside ]; then
    [ "${4-}" = mounts ] || exec unshare --mount bash "$0" "$folder" "$name" "$group" mounts
    # What earlier machines have left; a group with processes cannot be removed.
    mkdir -p "$folder/cgroup"
    mount -t cgroup2 none "$folder/cgroup"
    for old in "$folder"/cgroup/meshd-lab-*; do
        [ ! -d "$old" ] || find "$old" -depth -type d -exec rmdir {} + 2>/dev/null || true
    done
    until mkdir -p "$folder/cgroup/$group" && echo $$ >"$folder/cgroup/$group/cgroup.procs"; do sleep 0.01; done
    exec unshare --pid --fork --kill-child --cgroup --uts --ipc --mount bash "$0" "$folder" "$name" "$group" inside
fi

mount -t tmpfs tmpfs "$folder"
mkdir "$folder"/{files,work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$folder/files,workdir=$folder/work" "$folder/root"
cd "$folder/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 none sys/fs/cgroup
for empty in run tmp dev; do mount -t tmpfs tmpfs "$empty"; done
for device in null zero full random urandom tty; do
    touch "dev/$device"
    mount --bind "/dev/$device" "dev/$device"
done
mkdir dev/net dev/shm dev/pts
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mknod -m 666 dev/net/tun c 10 200
ln -s /proc/self/fd dev/fd
# Of this machine's own services none is wanted; without lists of packages apt-get is quick.
rm -rf etc/systemd/system etc/fstab etc/machine-id var/lib/meshd etc/meshd etc/apt/apt.conf.d/*packagekit var/lib/apt/lists/* usr/sbin/policy-rc.d
mkdir etc/systemd/system
touch etc/fstab etc/machine-id
hostname "$name"
echo "$name" >etc/hostname
mkdir old
pivot_root . old
umount -l /old
rmdir /old
exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 /lib/systemd/systemd --system \
    --unit=multi-user.target --log-target=console --show-status=0
