//! Who a container's process runs as: names of users and groups become numbers by the image's own `/etc/passwd`
//! and `/etc/group`. Rules as in containerd: the security context beats the image, numbers need no entry, a
//! user's groups of `/etc/group` are merged in unless the pod asks for strict groups.

use std::path::Path;

use k8s_cri::v1::{LinuxContainerSecurityContext, SupplementalGroupsPolicy};

use crate::error::{Error, Result};
use crate::rootdir::RootDir;

const FILE_BYTES_MAX: u64 = 4 << 20;

/// A resolved user.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Without duplicates, ascending.
    pub groups: Vec<u32>,
    /// From `/etc/passwd`; `/` when unknown.
    pub home: String,
}

/// The image's user database, as text.
#[derive(Debug, Default)]
pub struct Database {
    passwd: String,
    group: String,
}

impl Database {
    /// Reads both files below an image's root; missing files are empty.
    pub fn load(rootfs: &Path) -> Self {
        let Ok(root) = RootDir::open(rootfs) else { return Self::default() };
        let read = |path: &str| {
            let bytes = root.read(Path::new(path), FILE_BYTES_MAX).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Self { passwd: read("/etc/passwd"), group: read("/etc/group") }
    }

    fn users(&self) -> impl Iterator<Item = (&str, u32, u32, &str)> {
        self.passwd.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            Some((name, uid, gid, fields.nth(1).unwrap_or("/")))
        })
    }

    fn groups(&self) -> impl Iterator<Item = (&str, u32, &str)> {
        self.group.lines().filter_map(|line| {
            let mut fields = line.split(':');
            Some((fields.next()?, fields.nth(1)?.parse().ok()?, fields.next().unwrap_or_default()))
        })
    }

    fn uid_of(&self, name: &str) -> Result<u32> {
        name.parse().or_else(|_| {
            self.users().find(|(have, ..)| *have == name).map(|(_, uid, ..)| uid).ok_or_else(|| {
                Error::invalid(format!("unable to find user {name}: no matching entries in passwd file"))
            })
        })
    }

    fn gid_of(&self, name: &str) -> Result<u32> {
        name.parse().or_else(|_| {
            self.groups().find(|(have, ..)| *have == name).map(|(_, gid, _)| gid).ok_or_else(|| {
                Error::invalid(format!("unable to find group {name}: no matching entries in group file"))
            })
        })
    }
}

/// Resolves the process's user from the security context and the image's `USER` (`user[:group]`).
pub fn resolve(
    context: &LinuxContainerSecurityContext,
    image_user: &str,
    database: &Database,
) -> Result<User> {
    let (image_name, image_group) = match image_user.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (image_user, None),
    };
    let asked = match (&context.run_as_user, context.run_as_username.as_str()) {
        (Some(uid), _) => Some(id(uid.value, "user")?),
        (None, "") => None,
        (None, name) => Some(database.uid_of(name)?),
    };
    let uid = match (asked, image_name) {
        (Some(uid), _) => uid,
        (None, "") => 0,
        (None, name) => database.uid_of(name)?,
    };
    let entry = database.users().find(|(_, have, ..)| *have == uid);
    let gid = match (&context.run_as_group, asked, image_group) {
        (Some(gid), ..) => id(gid.value, "group")?,
        (None, None, Some(group)) if !group.is_empty() => database.gid_of(group)?,
        _ => entry.map_or(0, |(_, _, gid, _)| gid),
    };
    let mut groups = vec![gid];
    for group in &context.supplemental_groups {
        groups.push(id(*group, "group")?);
    }
    let merge = context.supplemental_groups_policy == SupplementalGroupsPolicy::Merge as i32;
    if let (true, Some((name, ..))) = (merge, entry) {
        let member = |members: &str| members.split(',').any(|member| member == name);
        groups.extend(database.groups().filter(|(_, _, members)| member(members)).map(|(_, gid, _)| gid));
    }
    groups.sort_unstable();
    groups.dedup();
    let home = entry.map_or("/", |(.., home)| if home.is_empty() { "/" } else { home }).to_owned();
    Ok(User { uid, gid, groups, home })
}

fn id(value: i64, what: &str) -> Result<u32> {
    u32::try_from(value)
        .map_err(|_| Error::invalid(format!("{what} id {value} is not between 0 and 4294967295")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_cri::v1::Int64Value;

    fn database() -> Database {
        Database {
            passwd: "root:x:0:0:root:/root:/bin/sh\nweb:x:101:102:,,,:/var/www:/bin/sh\n".into(),
            group: "root:x:0:\nweb:x:102:\nlogs:x:200:web,root\nssl:x:201:other\n".into(),
        }
    }

    #[test]
    fn users_resolve_as_containerd_resolves_them() {
        let context = LinuxContainerSecurityContext::default;
        let value = |value| Some(Int64Value { value });
        let strict = SupplementalGroupsPolicy::Strict as i32;
        let cases = [
            ("nothing is root", context(), "", (0, 0, vec![0, 200], "/root")),
            ("image name", context(), "web", (101, 102, vec![102, 200], "/var/www")),
            ("image name and group", context(), "web:ssl", (101, 201, vec![200, 201], "/var/www")),
            ("image numbers", context(), "5:6", (5, 6, vec![6], "/")),
            (
                "pod number beats image, group from passwd",
                LinuxContainerSecurityContext { run_as_user: value(101), ..context() },
                "root:ssl",
                (101, 102, vec![102, 200], "/var/www"),
            ),
            (
                "pod groups are added",
                LinuxContainerSecurityContext {
                    run_as_user: value(7),
                    run_as_group: value(8),
                    supplemental_groups: vec![9, 8],
                    ..context()
                },
                "",
                (7, 8, vec![8, 9], "/"),
            ),
            (
                "strict leaves out the image's groups",
                LinuxContainerSecurityContext { supplemental_groups_policy: strict, ..context() },
                "web",
                (101, 102, vec![102], "/var/www"),
            ),
        ];
        for (name, context, image, (uid, gid, groups, home)) in cases {
            let want = User { uid, gid, groups, home: home.into() };
            assert_eq!(resolve(&context, image, &database()).unwrap(), want, "{name}");
        }
    }

    #[test]
    fn unknown_names_are_told() {
        let error = resolve(&Default::default(), "nobody", &database()).unwrap_err();
        assert_eq!(error.message, "unable to find user nobody: no matching entries in passwd file");
    }
}
