//! Where a file's times tell of every write to it: a digest is remembered nowhere else.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, fstatfs, major, minor, syncfs};

/// What statfs(2) calls ext4, XFS, Btrfs and F2FS: the first write to a mapped page sets a file's times there, and so does the
/// first one after it was written to the disk. On tmpfs nothing ever does; of network file systems, which others write to,
/// nobody knows.
const TIMED: [i64; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010];

/// And an overlay, which is as the directories that it shows.
const OVERLAY: i64 = 0x794c_7630;

/// A program that has a file mapped changes its times only with its first write to a page since that was last written
/// to the disk. All are written now, so that every later write is seen. Returns whose files that is true of.
pub(super) fn settle(model: &Path) -> Option<u64> {
    let file = open(model)?;
    let device = File::from(file.try_clone().ok()?).metadata().ok()?.dev();
    let timed = match fstatfs(&file).ok()?.f_type {
        OVERLAY => {
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
            layers(&mounts, device)?.iter().all(|layer| is_timed(layer))
        }
        found => TIMED.contains(&found),
    };
    syncfs(&file).ok()?;
    timed.then_some(device)
}

/// What may be a pipe, which is not waited for.
fn open(path: &Path) -> Option<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// A directory of an overlay, which is written to the disk. One that is not seen from here, as from within a container,
/// may be anywhere: in memory, or on another machine.
fn is_timed(layer: &Path) -> bool {
    let seen = layer.is_absolute().then(|| open(layer)).flatten();
    seen.is_some_and(|layer| {
        fstatfs(&layer).is_ok_and(|found| TIMED.contains(&found.f_type)) && syncfs(&layer).is_ok()
    })
}

/// The directories that the overlay of a device shows, and the one that it writes to, as the mounts say (proc(5),
/// `/proc/pid/mountinfo`). None where it is not written to the disk when somebody asks for it, or none is named.
fn layers(mounts: &str, device: u64) -> Option<Vec<PathBuf>> {
    let device = format!("{}:{}", major(device), minor(device));
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some(&device))?;
    let options = line.rsplit_once(" - ")?.1.split(' ').nth(2)?;
    let mut layers = Vec::new();
    for option in options.split(',') {
        match option.split_once('=') {
            // What has a colon in its name cannot be told from two, and is not found.
            Some(("upperdir" | "lowerdir" | "lowerdir+" | "datadir+", paths)) => {
                layers.extend(paths.split(':').filter(|path| !path.is_empty()).map(unescaped));
            }
            _ if option == "volatile" => return None,
            _ => {}
        }
    }
    (!layers.is_empty()).then_some(layers)
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
    fn an_overlay_is_as_what_it_shows() {
        let mounts = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
                      40 22 0:33 / /a rw shared:2 - overlay overlay rw,lowerdir=/l,upperdir=/dev/shm/my\\040upper,workdir=/w\n\
                      41 22 0:34 / /b rw - overlay overlay rw,lowerdir=/l:/m,upperdir=/u,workdir=/w,volatile\n\
                      42 22 0:35 / /c ro - overlay none ro,lowerdir=/l:/m::/n\n\
                      43 22 0:36 / /d ro - overlay none ro,lowerdir+=l,datadir+=/m\n\
                      44 22 0:37 / /e ro - overlay none ro\n";
        let of = |minor| {
            let layers = layers(mounts, makedev(0, minor))?;
            Some(layers.iter().map(|layer| layer.display().to_string()).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(of(33).as_deref(), Some("/l /dev/shm/my upper"));
        assert_eq!((of(35).as_deref(), of(36).as_deref()), (Some("/l /m /n"), Some("l /m")));
        assert_eq!((of(34), of(37), of(38)), (None, None, None));
        for nobody_knows in ["/dev/shm", "/nobody/sees/that", "tests", "."] {
            assert!(!is_timed(nobody_knows.as_ref()), "{nobody_knows}");
        }
    }
}
