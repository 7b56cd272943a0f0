//! Who wrote how often, by the API server's audit log.
//!
//! Its metrics know no users, so each whose writes are counted comes in a name of its own: its kubeconfig is the
//! administrator's, who asks in that name. Counted is every POST, PUT, PATCH and DELETE that the API server answered,
//! refused ones, statuses, leases and events included.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::json;

/// The log of one API server.
pub struct Audit {
    log: PathBuf,
}

/// A place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(u64);

/// What one user wrote, by resource.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Writes(BTreeMap<String, u32>);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    impersonated_user: Option<User>,
    object_ref: Option<Reference>,
}

#[derive(Deserialize)]
struct User {
    username: String,
}

#[derive(Deserialize)]
struct Reference {
    resource: String,
    subresource: Option<String>,
}

impl Audit {
    /// The log in this file.
    pub fn new(log: PathBuf) -> Self {
        Self { log }
    }

    /// Its end: what is counted later begins here.
    ///
    /// # Errors
    /// When there is no log.
    pub fn mark(&self) -> Result<Mark> {
        let about = std::fs::metadata(&self.log).context(self.log.display().to_string())?;
        Ok(Mark(about.len()))
    }

    /// What `user` wrote since then.
    ///
    /// # Errors
    /// When the log is not one.
    pub fn since(&self, mark: Mark, user: &str) -> Result<Writes> {
        let mut file = BufReader::new(File::open(&self.log)?);
        file.seek(SeekFrom::Start(mark.0))?;
        let (mut writes, mut text) = (Writes::default(), String::new());
        loop {
            text.clear();
            // A line without an end is being written.
            if file.read_line(&mut text)? == 0 || !text.ends_with('\n') {
                return Ok(writes);
            }
            // Most lines are of others, and to look for the name costs less than to read the line.
            if !text.contains(user) {
                continue;
            }
            let line: Line = serde_json::from_str(&text).context(self.log.display().to_string())?;
            if line.impersonated_user.is_none_or(|by| by.username != user) {
                continue;
            }
            let of = line.object_ref.map_or("others".into(), |object| {
                let below = object.subresource.map(|below| format!("/{below}"));
                object.resource + &below.unwrap_or_default()
            });
            *writes.0.entry(of).or_default() += 1;
        }
    }
}

impl Writes {
    /// How many in all.
    pub fn number(&self) -> f64 {
        self.0.values().copied().map(f64::from).sum()
    }
}

impl fmt::Display for Writes {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self
            .0
            .iter()
            .map(|(of, number)| format!("{number} {of}"))
            .collect();
        write!(to, "writes: {}", parts.join(", "))
    }
}

/// Makes a kubeconfig in `folder` with which the administrator asks in the name of `user`, with all rights.
///
/// # Errors
/// When the administrator's cannot be read, or the other not written.
pub fn kubeconfig_of(admin: &Path, user: &str, folder: &Path) -> Result<PathBuf> {
    let text = std::fs::read_to_string(admin).context(admin.display().to_string())?;
    let mut config: serde_json::Value = serde_yaml::from_str(&text)?;
    let access = config.pointer_mut("/users/0/user");
    let Some(access) = access.and_then(serde_json::Value::as_object_mut) else {
        bail!("{}: there is no user", admin.display());
    };
    access.insert("as".into(), json!(user));
    access.insert("as-groups".into(), json!(["system:masters"]));
    let path = folder.join(format!("{user}.kubeconfig"));
    std::fs::write(&path, config.to_string())?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn line(user: &str, resource: &str, more: &str) -> String {
        format!(
            "{{\"verb\":\"create\",\"user\":{{\"username\":\"admin\"}},\"impersonatedUser\":{{\"username\":\"{user}\"}},\
             \"objectRef\":{{\"resource\":\"{resource}\"{more}}}}}\n"
        )
    }

    #[test]
    fn writes_are_counted_by_who_wrote_them_and_from_a_mark_on() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("audit.log");
        let audit = Audit::new(path.clone());
        assert!(audit.mark().is_err(), "there is no log yet");
        std::fs::write(&path, line("ours", "pods", "")).expect("written");
        let mark = audit.mark().expect("a log");
        let mut file = File::options().append(true).open(&path).expect("a log");
        for text in [
            line("ours", "pods", ""),
            line("ours", "pods", ""),
            line("ours", "models", ",\"subresource\":\"status\""),
            line("theirs", "pods", ",\"name\":\"ours\""),
            "{\"user\":{\"username\":\"ours\"}}\n".into(),
            line("ours", "pods", "").trim_end().into(),
        ] {
            file.write_all(text.as_bytes()).expect("written");
        }
        let writes = audit.since(mark, "ours").expect("lines");
        assert_eq!(writes.to_string(), "writes: 1 models/status, 2 pods");
        assert!((writes.number() - 3.0).abs() < f64::EPSILON);
        let others = audit.since(mark, "theirs").expect("lines");
        assert_eq!(others.to_string(), "writes: 1 pods");
    }

    #[test]
    fn a_kubeconfig_in_anothers_name_is_the_administrators_with_a_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let admin = folder.path().join("admin.kubeconfig");
        let text = "users: [{name: admin, user: {client-key-data: x}}]\n";
        std::fs::write(&admin, text).expect("written");
        let path = kubeconfig_of(&admin, "ours", folder.path()).expect("made");
        let made = std::fs::read_to_string(path).expect("a file");
        let made: serde_json::Value = serde_json::from_str(&made).expect("json");
        let user = json!({"client-key-data": "x", "as": "ours", "as-groups": ["system:masters"]});
        assert_eq!(made["users"][0]["user"], user);
        std::fs::write(&admin, "users: []\n").expect("written");
        assert!(kubeconfig_of(&admin, "ours", folder.path()).is_err());
    }
}
