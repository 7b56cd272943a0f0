//! What must be done in the end, also when this process is killed: a shell waits at a pipe that closes with the process
//! that holds it, and then runs its script. Nothing is missed by SIGKILL, a panic or Ctrl-C, since nobody has to act.

use std::process::{Child, Command, Stdio};

use std::os::unix::process::CommandExt as _;

use anyhow::{Context, Result};

/// A script that runs when this is dropped, and when the process is gone.
#[derive(Debug)]
pub struct Ending(Child);

impl Ending {
    /// Has `script` run in the end, with `arguments` as its `$1`, `$2` and so on.
    ///
    /// # Errors
    /// When there is no shell.
    pub fn new(script: &str, arguments: &[&str]) -> Result<Self> {
        let child = Command::new("sh")
            .args(["-c", &format!("cat > /dev/null; {script}"), "sh"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // Ctrl-C goes to the whole group of whoever runs in the foreground.
            .process_group(0)
            .spawn()
            .with_context(|| format!("sh, which is to run {script:?} in the end"))?;
        Ok(Self(child))
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // A script that fails has said why on standard error.
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;

    const NAME: &str = "ending::tests::the_end_comes_also_for_a_process_that_is_killed";
    const FILE: &str = "ENDING_TEST_FILE";

    fn touch(file: &str) -> Ending {
        Ending::new("sleep 0.1; touch \"$1\"", &[file]).expect("a shell")
    }

    #[test]
    fn dropping_waits_for_the_end() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("end");
        let ending = touch(file.to_str().expect("utf-8"));
        assert!(!file.exists(), "it is not the end yet");
        drop(ending);
        assert!(file.exists());
    }

    /// Runs itself once more as the process that is killed.
    #[test]
    fn the_end_comes_also_for_a_process_that_is_killed() {
        if let Ok(file) = std::env::var(FILE) {
            let _ending = touch(&file);
            std::fs::write(format!("{file}.begin"), "").expect("written");
            std::thread::sleep(Duration::from_secs(60));
            return;
        }
        for signal in ["-KILL", "-TERM"] {
            let folder = tempfile::tempdir().expect("a folder");
            let file = folder.path().join("end");
            let mut child = Command::new(std::env::current_exe().expect("this test"))
                .args(["--exact", NAME])
                .env(FILE, &file)
                .stdout(Stdio::null())
                .spawn()
                .expect("it starts");
            let appears = |file: &Path| {
                let here = (0..500).any(|_| {
                    std::thread::sleep(Duration::from_millis(20));
                    file.exists()
                });
                assert!(here, "{signal}: {} does not appear", file.display());
            };
            appears(&folder.path().join("end.begin"));
            assert!(!file.exists(), "{signal}: it is not the end yet");
            let process = child.id().to_string();
            let killed = Command::new("kill").args([signal, &process]).status();
            assert!(killed.expect("kill").success());
            child.wait().expect("it has ended");
            appears(&file);
        }
    }
}
