# A node of a cluster: containerd, kubelet and kube-proxy as processes of a machine of its own, in the network namespace
# that this runs in. Its disk is a mount of a process that outlives it; files of this machine are below, unchanged.
#
#   node.sh disk FOLDER                mounts the disk and keeps it
#   node.sh boot FOLDER NAME GROUP     boots on it, with the settings in FILES/settings (below)
#
# GROUP names its control groups. FOLDER.files has kubeconfigs and settings, FOLDER.logs gets the logs.
set -euo pipefail
stage=$1 folder=$2 name=${3-} group=${4-}
files=$folder.files logs=$folder.logs root=$folder/root

# Control groups of version 1, a mount each: its name, and its options. Version 2 without controllers is left alone.
hierarchies() {
    awk '{ for (i = 7; $i != "-"; i++); if ($(i + 1) == "cgroup") print $5, $(i + 3) }' /proc/self/mountinfo |
        sed -E 's#\S*/(\S+) #\1 #; s/ (rw,)?/ /; s/ (.*name=)/ none,\1/'
}

case $stage in
disk)
    mount -t tmpfs tmpfs "$folder"
    mkdir "$folder"/{files,work,root,containerd,kubelet}
    echo ready
    exec sleep infinity
    ;;
boot)
    while read -r hierarchy _; do
        mkdir -p "/sys/fs/cgroup/$hierarchy/$group"
        # A new group of this kind has no processors and no memory.
        for file in cpuset.cpus cpuset.mems; do
            [ ! -e "/sys/fs/cgroup/$hierarchy/$file" ] ||
                cat "/sys/fs/cgroup/$hierarchy/$file" >"/sys/fs/cgroup/$hierarchy/$group/$file"
        done
        echo $$ >"/sys/fs/cgroup/$hierarchy/$group/cgroup.procs"
    done < <(hierarchies)
    exec unshare --mount --pid --fork --kill-child --cgroup --uts --ipc bash "$0" inside "$folder" "$name" "$group"
    ;;
esac

. "$files/settings"
hostname "$name"
mount -t overlay overlay -o "lowerdir=/,upperdir=$folder/files,workdir=$folder/work" "$root"
groups=$(hierarchies)
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
while read -r hierarchy options; do
    mkdir "$root/sys/fs/cgroup/$hierarchy"
    mount -t cgroup -o "$options" cgroup "$root/sys/fs/cgroup/$hierarchy"
done <<<"$groups"
# What the kubelet wants of the kernel is the whole machine's: it finds files that say so already.
mkdir "$root/run/tunables"
while read -r tunable value; do
    echo "$value" >"$root/run/tunables/${tunable//\//_}"
    mount --bind "$root/run/tunables/${tunable//\//_}" "$root/proc/sys/$tunable"
done <<END
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
END
# Overlays on an overlay are refused.
mkdir -p "$root"/var/lib/{containerd,kubelet,meshd} "$root"/opt/{api,cluster,images,cni/bin} "$root"/run/{lock,netns} \
    "$root"/etc/{cni/net.d,kubernetes/manifests} "$root"/var/log/{node,pods,containers}
mount --bind "$folder/containerd" "$root/var/lib/containerd"
mount --bind "$folder/kubelet" "$root/var/lib/kubelet"
mount --bind "$logs" "$root/var/log/node"
mount --bind "$API" "$root/opt/api"
mount --bind "$CLUSTER" "$root/opt/cluster"
mount --bind "$IMAGES" "$root/opt/images"
cp "$files"/*.kubeconfig "$root/etc/kubernetes/"
cp "$files/ca.pem" "$root/etc/kubernetes/"
if [ ! -e "$folder/installed" ]; then
    # This machine's own are not a new node's. Plugins are there only once the chart has installed them.
    rm -rf "$root"/var/lib/meshd/* "$root"/etc/cni/net.d/* "$root"/opt/cni/bin/* "$root"/etc/kubernetes/manifests/*
    touch "$folder/installed"
fi
echo "$name" >"$root/etc/hostname"
printf '127.0.0.1 localhost\n%s %s\n' "$ADDRESS" "$name" >"$root/etc/hosts"
echo 'nameserver 127.0.0.1' >"$root/etc/resolv.conf"
mkdir -p "$root/.old"
cd "$root"
pivot_root . .old
cd /
umount -l /.old
rmdir /.old
mount --make-rshared /

cat >/etc/containerd.toml <<END
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.10"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
END
cat >/etc/kubelet.yaml <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
clusterDNS: [$DNS]
clusterDomain: cluster.local
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
failSwapOn: false
failCgroupV1: false
localStorageCapacityIsolation: false
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, nodefs.inodesFree: 1%, imagefs.available: 1%}
imageGCHighThresholdPercent: 100
maxPods: 200
serializeImagePulls: true
staticPodPath: /etc/kubernetes/manifests
syncFrequency: 10s
END
# Sizes of connection tracking are the machine's.
cat >/etc/kube-proxy.yaml <<END
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: $PROXY_MODE
clientConnection: {kubeconfig: /etc/kubernetes/proxy.kubeconfig}
hostnameOverride: $name
clusterCIDR: $POD_NETWORKS
conntrack: {maxPerCore: 0, min: 0}
END
containerd -c /etc/containerd.toml >>/var/log/node/containerd.log 2>&1 &
until ctr version >/dev/null 2>&1; do sleep 0.1; done
if [ ! -e /var/lib/containerd/imported ]; then
    for image in /opt/cluster/images/*.tar /opt/images/*.tar; do
        ctr -n k8s.io images import --no-unpack "$image" >>/var/log/node/images.log 2>&1
    done
    touch /var/lib/containerd/imported
fi
/opt/cluster/kube-proxy --config /etc/kube-proxy.yaml >>/var/log/node/kube-proxy.log 2>&1 &
/opt/cluster/kubelet --config /etc/kubelet.yaml --kubeconfig /etc/kubernetes/kubelet.kubeconfig --hostname-override "$name" \
    --node-ip "$NODE_IPS" --node-labels "$LABELS" --root-dir /var/lib/kubelet --cert-dir /var/lib/kubelet/pki -v=2 \
    >>/var/log/node/kubelet.log 2>&1 &
echo "$!" >/run/kubelet.pid
echo up
# Also the first process, to which all orphans come.
while :; do
    sleep infinity &
    wait $! || true
done
