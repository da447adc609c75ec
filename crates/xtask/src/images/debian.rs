//! Debian packages: which are needed, fetched by `apt-get`, unpacked by `dpkg-deb`.
//!
//! Nothing is installed. Of a package's dependencies only libraries are followed: what else Debian wants
//! (an init script's helpers, configuration questions) is for running on a whole system.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// Beginnings of names of packages with libraries.
const LIBRARIES: [&str; 2] = ["lib", "zlib1g"];
/// Libraries for other programs than ours.
const NOT_NEEDED: [&str; 2] = ["libc-bin", "libnginx-mod-"];

const DEPENDS: [&str; 7] = [
    "depends",
    "--no-recommends",
    "--no-suggests",
    "--no-conflicts",
    "--no-breaks",
    "--no-replaces",
    "--no-enhances",
];

/// A directory of packages, each fetched once.
pub struct Packages {
    dir: PathBuf,
    /// Answers already given: several images are made of the same packages.
    known: RefCell<HashMap<Vec<String>, Vec<PathBuf>>>,
}

impl Packages {
    /// Packages kept in `dir`.
    pub fn new(dir: PathBuf) -> Result<Packages> {
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        Ok(Packages { dir, known: RefCell::default() })
    }

    /// The package files of `names`, in that order, and after them of the libraries they need.
    pub fn fetch(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let key: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        if let Some(files) = self.known.borrow().get(&key) {
            return Ok(files.clone());
        }
        let mut all = key.clone();
        all.extend(libraries(names)?);
        let files = self.file_names(&all)?;
        let missing: Vec<&String> = all
            .iter()
            .zip(&files)
            .filter(|(_, file)| !self.dir.join(file).exists())
            .map(|(name, _)| name)
            .collect();
        if !missing.is_empty() {
            let mut command = Command::new("apt-get");
            command.current_dir(&self.dir).args(["download", "--quiet"]);
            // Root's own downloads go through a user who may not write here.
            command.args(["-o", "APT::Sandbox::User=root"]).args(&missing);
            run(&mut command)?;
        }
        let paths: Vec<PathBuf> = files.into_iter().map(|file| self.dir.join(file)).collect();
        self.known.borrow_mut().insert(key, paths.clone());
        Ok(paths)
    }

    /// What `apt-get download` would call the files: name, version and architecture. One call for all, since
    /// each reads the whole package lists.
    fn file_names(&self, names: &[String]) -> Result<Vec<String>> {
        let listing = run(Command::new("apt-get").args(["download", "--print-uris"]).args(names))?;
        let files: Vec<&str> = listing.lines().filter_map(|line| line.split(' ').nth(1)).collect();
        let file_of = |name: &String| {
            let start = format!("{name}_");
            let file = files.iter().find(|file| file.starts_with(&start));
            file.map(|file| (*file).to_owned()).with_context(|| format!("apt-get knows no file of {name}"))
        };
        names.iter().map(file_of).collect()
    }
}

/// Unpacks a package over `root`.
pub fn unpack(package: &Path, root: &Path) -> Result<()> {
    run(Command::new("dpkg-deb").arg("--extract").arg(package).arg(root)).map(drop)
}

/// The version of what is packaged: `1.22.1` of `1:1.22.1-9+deb12u1`.
pub fn upstream_version(package: &Path) -> Result<String> {
    let version = run(Command::new("dpkg-deb").arg("--field").arg(package).arg("Version"))?;
    let version = version.trim();
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    Ok(version.rsplit_once('-').map_or(version, |(upstream, _)| upstream).to_owned())
}

/// All libraries below these packages, sorted, the packages themselves left out.
fn libraries(names: &[&str]) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut open: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    while !open.is_empty() {
        let listing = run(Command::new("apt-cache").args(DEPENDS).args(&open))?;
        let libraries = listing.lines().filter_map(dependency).filter(|name| is_library(name));
        open = libraries.filter(|name| found.insert((*name).to_owned())).map(str::to_owned).collect();
    }
    Ok(found)
}

/// The package in a line such as `  Depends: libc6` or `  PreDepends: libc6`. An alternative (`|`) is only
/// one of several; its last one has no bar.
fn dependency(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let name = line.strip_prefix("Depends: ").or_else(|| line.strip_prefix("PreDepends: "))?;
    (!name.starts_with('<')).then_some(name)
}

fn is_library(name: &str) -> bool {
    LIBRARIES.iter().any(|start| name.starts_with(start))
        && !NOT_NEEDED.iter().any(|start| name.starts_with(start))
}

fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("run {program}; is this Debian or Ubuntu?"))?;
    if !output.status.success() {
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
        let reason = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{program} {}: {}\nif packages are unknown, run: apt-get update",
            arguments.join(" "),
            reason.trim()
        );
    }
    let text = String::from_utf8(output.stdout).context("output that is no text")?;
    ensure!(!text.is_empty() || program == "dpkg-deb", "{program} printed nothing");
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_real_libraries_are_followed() {
        let listing = "nginx\n  Depends: libc6\n |Depends: libfoo1\n  Depends: libbar1\n  Depends: nginx-common\n  \
                       PreDepends: zlib1g\n  Depends: <debconf-2.0>\n  Depends: libnginx-mod-http-geoip\n  Breaks: libold\n";
        let found: Vec<&str> =
            listing.lines().filter_map(dependency).filter(|name| is_library(name)).collect();
        assert_eq!(found, ["libc6", "libbar1", "zlib1g"]);
    }
}
