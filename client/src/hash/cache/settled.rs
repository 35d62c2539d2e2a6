//! Where a file's times tell of every write to it: a digest is remembered nowhere else.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{fstatfs, major, minor, statfs, syncfs};
use rustix::io::Errno;

/// What statfs(2) calls ext4, XFS, Btrfs and F2FS: the first write to a mapped page sets a file's times there, and so does the
/// first one after it was written to the disk. On tmpfs nothing ever does; of network file systems, which others write to,
/// nobody knows.
const TIMED: [i64; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010];

/// And an overlay, which is as what it writes to.
const OVERLAY: i64 = 0x794c_7630;

/// A program that has a file mapped changes its times only with its first write to a page since that was last written
/// to the disk. All are written now, so that every later write is seen. Returns whose files that is true of.
pub(super) fn settle(model: &Path) -> Option<u64> {
    let file = std::fs::File::open(model).ok()?;
    let device = file.metadata().ok()?.dev();
    let timed = match fstatfs(&file).ok()?.f_type {
        OVERLAY => is_timed(upper(&std::fs::read_to_string("/proc/self/mountinfo").ok()?, device)?),
        found => TIMED.contains(&found),
    };
    syncfs(&file).ok()?;
    timed.then_some(device)
}

/// Where an overlay writes to.
#[derive(Debug, PartialEq, Eq)]
enum Upper {
    /// To a directory.
    Directory(PathBuf),
    /// Nowhere.
    None,
    /// To one that is not written to the disk when somebody asks for it.
    Volatile,
}

fn is_timed(upper: Upper) -> bool {
    match upper {
        // In a container nobody sees it: there it is a disk's, mostly.
        Upper::Directory(directory) => match statfs(directory) {
            Ok(found) => TIMED.contains(&found.f_type),
            Err(error) => error == Errno::NOENT,
        },
        Upper::None => true,
        Upper::Volatile => false,
    }
}

/// What the mounts say of the overlay of a device (proc(5), `/proc/pid/mountinfo`).
fn upper(mounts: &str, device: u64) -> Option<Upper> {
    let device = format!("{}:{}", major(device), minor(device));
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some(&device))?;
    let options = line.rsplit_once(" - ")?.1.split(' ').nth(2)?;
    if options.split(',').any(|option| option == "volatile") {
        return Some(Upper::Volatile);
    }
    let upper = options.split(',').find_map(|option| option.strip_prefix("upperdir="));
    Some(upper.map_or(Upper::None, |upper| Upper::Directory(unescaped(upper))))
}

/// Spaces and the like stand as `\\040`.
fn unescaped(text: &str) -> PathBuf {
    let mut parts = text.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let escaped = part
            .split_at_checked(3)
            .and_then(|(octal, rest)| Some((u8::from_str_radix(octal, 8).ok()?, rest)));
        match escaped {
            Some((byte, rest)) => {
                bytes.push(byte);
                bytes.extend_from_slice(rest.as_bytes());
            }
            None => bytes.extend_from_slice(part.as_bytes()),
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use rustix::fs::makedev;

    use super::*;

    #[test]
    fn an_overlay_is_as_what_it_writes_to() {
        let mounts = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
                      40 22 0:33 / /a rw shared:2 - overlay overlay rw,lowerdir=/l,upperdir=/dev/shm/my\\040upper,workdir=/w\n\
                      41 22 0:34 / /b rw - overlay overlay rw,lowerdir=/l:/m,upperdir=/u,workdir=/w,volatile\n\
                      42 22 0:35 / /c ro - overlay none ro,lowerdir=/l:/m\n";
        let of = |minor| upper(mounts, makedev(0, minor));
        assert_eq!(of(33), Some(Upper::Directory("/dev/shm/my upper".into())));
        assert_eq!((of(34), of(35), of(36)), (Some(Upper::Volatile), Some(Upper::None), None));
        let is = |directory: &str| is_timed(Upper::Directory(directory.into()));
        assert!(
            !is("/dev/shm") && is("/nobody/sees/that") && is_timed(Upper::None) && !is_timed(Upper::Volatile)
        );
    }
}
