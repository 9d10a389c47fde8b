#!/bin/bash
# First process of a host of tests/cluster/lan.py: gives it folders, a shared disk and names of its own, then sshd.
# Arguments: HOST, the host's folder, the folder that plays the NFS server, folders that it sees unchanged.
set -eu
hostname "$1"
# first, since the folders below hide what lies in them
mount --bind "$2" /mnt
mount --bind "$3" /srv
own=/mnt
shift 3

# what all hosts share, taken into the private folders before these hide the originals
for folder in "$@"; do
  case $folder in
    # below a folder that this host replaces with its own further down, so into the replacement
    /root/*) place=$own/root${folder#/root} ;;
    /tmp/*) place=$own/tmp${folder#/tmp} ;;
    *) continue ;;
  esac
  mkdir -p "$place"
  mount --bind "$folder" "$place"
  mount -o remount,bind,ro "$place"
done

# Names are looked up in a file alone: `ray start` asks for its own several times, each 5 to 10 s where no DNS answers.
for file in hosts resolv.conf nsswitch.conf; do mount --bind "$own/etc/$file" "/etc/$file"; done
mount --rbind "$own/root" /root
mount --bind "$own/run" /run
mount --rbind "$own/tmp" /tmp
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -t devpts devpts /dev/pts -o newinstance,ptmxmode=0666,mode=620,gid=5
mount --bind /dev/pts/ptmx /dev/ptmx

cd /
/usr/sbin/sshd -e -h /run/host_key -o PermitRootLogin=prohibit-password -o UsePAM=no -o PidFile=/run/sshd.pid \
  -o AcceptEnv=none -o MaxStartups=100
touch /run/ready
while :; do wait -n 2>/dev/null || sleep 1; done # as the first process it reaps orphans
