# The raw image of tests/vm/nvme-files.sh, before and after. Run by scripts/vm; $tools and $modules are what the guest has
# as /tools and /lib/modules.
export MKE2FS_CONFIG=$tools/etc/mke2fs.conf

case $1 in
prepare)
    mkdir -p content/from-outside
    cp -r "$modules"/*/kernel/fs/nls content/from-outside
    # Real files, small ones, as there are to be many: packages of Debian as they were unpacked, and modules.
    for folder in "$tools" "$modules"; do
        (cd "$folder" && find . -type f -size -32k -print0 | sort -z) >list
        (cd "$folder" && xargs -0 sha256sum) <list >>sums
        tar -r -f content/files.tar -C "$folder" --null -T list
    done
    "$tools/mkfs.ext4" -q -F -d content image
    ;;
check)
    "$tools/e2fsck" -f -n image
    mkdir after
    # As somebody who is not root it says that it cannot give the files their owners.
    "$tools/debugfs" -R "rdump /tree after" image 2>&1 | grep -v 'while changing ownership' || true
    (cd after/tree && sha256sum --quiet -c) <sums
    count=$(find after/tree -type f | wc -l)
    [[ $count -ge 5000 && $count -eq $(wc -l <sums) ]] || { echo "there are $count files of $(wc -l <sums)" && exit 1; }
    echo "$count files on the raw image have the checksums of those that they were made from"
    ;;
esac
