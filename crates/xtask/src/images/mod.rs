//! Images for tests and the sample, where no registry can be reached: Debian packages, unpacked, with the
//! libraries they need, and our own toolbox.
//!
//! [`recipe`] says what each image is, [`debian`] gets packages, [`archive`] writes what comes out. An image
//! follows from its recipe and its package versions; a stamp beside the archive tells whether either changed.

mod archive;
mod debian;
mod recipe;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use archive::{Image, Tree};
use debian::Packages;
use recipe::{Base, RECIPES, Recipe};
use sha2::{Digest, Sha256};

/// Counts up when this code makes other images of the same recipes.
const GENERATION: u32 = 2;
/// Documentation and data that programs do without.
const UNNEEDED: [&str; 11] = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/share/bug",
    "usr/share/doc-base",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/aarch64-linux-gnu/gconv",
    "usr/lib/systemd",
    "lib/systemd",
    "etc/init.d",
];

/// Builds all images into `out`, or only those named.
pub fn build(out: &Path, names: &[String]) -> Result<()> {
    let known: Vec<&str> = RECIPES.iter().map(|recipe| recipe.name).collect();
    for name in names {
        ensure!(known.contains(&name.as_str()), "there is no image {name:?}; there are {}", known.join(", "));
    }
    fs::create_dir_all(out).with_context(|| format!("make {}", out.display()))?;
    let work = workspace().join("target/xtask-images");
    let packages = Packages::new(work.join("packages"))?;
    for recipe in
        RECIPES.iter().filter(|recipe| names.is_empty() || names.iter().any(|name| name == recipe.name))
    {
        build_one(recipe, &packages, &work, out).with_context(|| format!("image {}", recipe.name))?;
    }
    Ok(())
}

fn build_one(recipe: &Recipe, packages: &Packages, work: &Path, out: &Path) -> Result<()> {
    let start = Instant::now();
    let root = work.join("roots").join(recipe.name);
    let (inputs, version) = match recipe.base {
        Base::Packages(names) => {
            let archives = packages.fetch(names)?;
            let version = debian::upstream_version(&archives[0])?;
            (archives, version)
        }
        Base::Toolbox => (vec![build_toolbox(work)?], "1".to_owned()),
    };
    let stamp = stamp(recipe, &inputs)?;
    let (path, stamp_path) =
        (out.join(format!("{}.tar", recipe.name)), out.join(format!(".{}.stamp", recipe.name)));
    if path.exists() && fs::read_to_string(&stamp_path).is_ok_and(|known| known == stamp) {
        println!("{:<12} unchanged  {}", recipe.name, path.display());
        return Ok(());
    }
    let mut tree = match recipe.base {
        Base::Packages(_) => unpack(&inputs, &root)?,
        Base::Toolbox => Tree::new(),
    };
    if matches!(recipe.base, Base::Toolbox) {
        tree.file("toolbox", &inputs[0], 0o755);
    }
    add_busybox(recipe, packages, work, &mut tree)?;
    add_basics(&mut tree);
    for (path, content) in recipe.files {
        tree.bytes(path, content.as_bytes(), 0o644);
    }
    for (path, mode, owner) in recipe.directories {
        tree.directory(path, *mode, *owner);
    }
    for (path, target) in recipe.links {
        tree.link(path, target);
    }
    let image = Image { names: recipe.full_names(&version), tree, config: recipe.config() };
    archive::write(&image, &path)?;
    fs::write(&stamp_path, stamp)?;
    let megabytes = fs::metadata(&path)?.len() as f64 / 1e6;
    let seconds = start.elapsed().as_secs_f64();
    println!("{:<12} built in {seconds:.1}s, {megabytes:.1} MB  {}", recipe.name, path.display());
    println!("{:<12} {}", "", image.names.join(" "));
    Ok(())
}

/// Unpacks packages one over the other, without what nobody needs.
fn unpack(archives: &[PathBuf], root: &Path) -> Result<Tree> {
    if root.exists() {
        fs::remove_dir_all(root).with_context(|| format!("empty {}", root.display()))?;
    }
    fs::create_dir_all(root)?;
    for archive in archives {
        debian::unpack(archive, root)?;
    }
    for unneeded in UNNEEDED {
        let path = root.join(unneeded);
        if path.is_dir() {
            fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Tree::read(root)
}

/// A shell and the usual small programs, for `exec`; where the image has its own, that one stays.
fn add_busybox(recipe: &Recipe, packages: &Packages, work: &Path, tree: &mut Tree) -> Result<()> {
    if !recipe.shell {
        return Ok(());
    }
    let archives = packages.fetch(&["busybox-static"])?;
    let root = work.join("roots/busybox-static");
    unpack(&archives, &root)?;
    let program =
        [root.join("bin/busybox"), root.join("usr/bin/busybox")].into_iter().find(|path| path.exists());
    let program = program.context("the package busybox-static has no busybox")?;
    let listing = Command::new(&program).arg("--list").output().context("run busybox --list")?;
    ensure!(listing.status.success(), "busybox --list failed");
    tree.file("bin/busybox", &program, 0o755);
    for applet in String::from_utf8(listing.stdout)?.lines().filter(|applet| !applet.is_empty()) {
        let elsewhere = ["sbin", "bin"].iter().any(|dir| tree.has(&format!("{dir}/{applet}")));
        let path = format!("bin/{applet}");
        if applet != "busybox" && !elsewhere {
            tree.link(&path, "busybox");
        }
    }
    Ok(())
}

/// What every root file system has.
fn add_basics(tree: &mut Tree) {
    for (path, mode) in [
        ("dev", 0o755),
        ("proc", 0o555),
        ("sys", 0o555),
        ("run", 0o755),
        ("root", 0o700),
        ("tmp", 0o1777),
        ("var", 0o755),
    ] {
        tree.directory(path, mode, 0);
    }
    for dir in archive::USR_MERGED {
        tree.link(dir, &format!("usr/{dir}"));
        tree.directory(&format!("usr/{dir}"), 0o755, 0);
    }
    tree.directory("var/tmp", 0o1777, 0);
    tree.link("var/run", "/run");
    for (path, content) in recipe::BASICS {
        tree.bytes(path, content.as_bytes(), 0o644);
    }
}

/// Builds the toolbox as a static program, in a target directory of its own: other flags must not make cargo
/// build everything again.
fn build_toolbox(work: &Path) -> Result<PathBuf> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let dir = work.join("target");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(workspace())
        .args(["build", "--quiet", "--release", "--package", "toolbox", "--target", &target])
        .arg("--target-dir")
        .arg(&dir)
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status()
        .context("run cargo")?;
    if !status.success() {
        bail!("building the toolbox failed; is the target {target} installed (rustup target add {target})?");
    }
    Ok(dir.join(target).join("release/toolbox"))
}

/// Says from what an image was made: the recipe, this code's generation, and each input's content.
fn stamp(recipe: &Recipe, inputs: &[PathBuf]) -> Result<String> {
    let mut text = format!("generation {GENERATION}\n{recipe:?}\n");
    for input in inputs {
        let name = input.file_name().unwrap_or_default().to_string_lossy();
        let content = fs::read(input).with_context(|| format!("read {}", input.display()))?;
        text += &format!("{name} {}\n", archive::hex(&Sha256::digest(&content)));
    }
    Ok(text)
}

fn workspace() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.ancestors().nth(2).expect("this crate lies two levels below the workspace")
}
