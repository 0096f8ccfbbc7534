//! A file system in an image: it can be full, and its power can be cut.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use jobledger_server::domain::clock::Time;
use tempfile::TempDir;

/// A mounted image. Unmounted when dropped, and when this program ends, however it ends.
pub(super) struct Volume {
    folder: PathBuf,
    _keeper: Child,
}

impl Volume {
    /// Makes a volume of this many MiB. `None`, with a message, if this machine can't mount one.
    pub(super) fn new(mib: u32) -> Option<Self> {
        let folder = TempDir::with_prefix("jobledger-volume-").expect("a temporary directory").keep();
        let clean_up = r#"read -r _; umount -l "$0/mounted" 2>/dev/null; rm -rf "$0""#;
        let keeper = Command::new("sh")
            .args(["-c", clean_up])
            .arg(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell");
        let volume = Self { folder, _keeper: keeper };
        std::fs::create_dir(volume.path()).expect("the folder is there");
        run("truncate", &["-s", &format!("{mib}M")], &volume.image());
        let made = Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(volume.image()).status();
        let is_there = made.is_ok_and(|status| status.success()) && volume.mount();
        if !is_there {
            println!("left out: it takes root, mkfs.ext4 and loop devices");
        }
        is_there.then_some(volume)
    }

    /// Where the volume is mounted.
    pub(super) fn path(&self) -> PathBuf {
        self.folder.join("mounted")
    }

    fn image(&self) -> PathBuf {
        self.folder.join("image")
    }

    /// The journal is written on request or after a minute, so nothing reaches the disk by chance.
    fn mount(&self) -> bool {
        let mounted = Command::new("mount").args(["-o", "loop,commit=60"]).arg(self.image()).arg(self.path()).output();
        mounted.is_ok_and(|output| output.status.success())
    }

    /// Loses what is only in memory, and writes nothing more. Returns when that began.
    pub(super) fn cut_power(&self) -> Time {
        // EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH, as tests of file systems use it.
        let cut = "import fcntl, os, struct, sys, time
volume = os.open(sys.argv[1], os.O_RDONLY)
print(time.time_ns())
fcntl.ioctl(volume, 0x8004587d, struct.pack('I', 2))";
        let said = run("python3", &["-c", cut], &self.path());
        Time::from_timestamp_nanos(said.trim().parse().expect("it says when"))
    }

    /// Mounts the volume again as it is on the disk. No process may use it any more.
    pub(super) fn power_up(&self) {
        run("umount", &[], &self.path());
        assert!(self.mount());
    }

    /// Syncs everything so far.
    pub(super) fn sync(&self) {
        run("sync", &["-f"], &self.path());
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).stderr(Stdio::null()).status();
    }
}

fn run(program: &str, arguments: &[&str], path: &Path) -> String {
    let output = Command::new(program).args(arguments).arg(path).output().expect("the machine has it");
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
