//! Builds the stand-in `libcuda.so.1` from the kernel sources, and a stand-in `libnccl.so.2`, with a C++ compiler.
//!
//! Invariant: objects are named by the hash of everything that went into them, so a stale one is never linked and an
//! unchanged one is never rebuilt.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use thiserror::Error;

use crate::driver::NCCL_LIBRARY;
use crate::image::sha256;

/// Why there is no emulated driver.
#[derive(Debug, Error)]
pub enum BuildError {
    /// None of the usual names is a compiler.
    #[error("no C++ compiler: install g++ or set CXX")]
    NoCompiler,
    /// The machine switches threads in x86-64 assembly.
    #[error("kernels are emulated on x86-64 only")]
    WrongMachine,
    /// A source did not compile or link.
    #[error("{path}: {message}")]
    Compile {
        /// The source or the library.
        path: PathBuf,
        /// What the compiler said.
        message: String,
    },
    /// A file could not be read or written.
    #[error("cannot use {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Sources to build from, and where to.
#[derive(Clone, Debug)]
pub struct Emulation {
    root: PathBuf,
    out: PathBuf,
    /// Replaced texts by path relative to the root; mutation tests change one file.
    replaced: BTreeMap<PathBuf, String>,
    /// Only these kernel sources (by name without ending); empty is all.
    only: Vec<String>,
    /// With the address sanitizer.
    sanitized: bool,
}

const FLAGS: [&str; 10] = [
    "-std=c++17",
    "-O2",
    // Fused multiply-add and AVX2, but nothing that would tie a cached object to one machine.
    "-march=x86-64-v3",
    "-fPIC",
    "-pthread",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    // nvcc decides by itself which products and sums to fuse; here nothing is fused but what the source says.
    "-ffp-contract=off",
    // An index outside an array of known size traps, and the machine reports it.
    "-fsanitize=bounds",
    "-fsanitize-undefined-trap-on-error",
];

const SANITIZER: &str = "-fsanitize=address";

impl Emulation {
    /// Builds from the sources of this crate into `out`.
    pub fn new(out: &Path) -> Self {
        Self {
            root: PathBuf::from(env!("CARGO_MANIFEST_DIR")),
            out: out.to_owned(),
            replaced: BTreeMap::new(),
            only: Vec::new(),
            sanitized: false,
        }
    }

    /// Builds with the address sanitizer, whose library the program must have loaded before any other (`LD_PRELOAD`).
    pub fn sanitized(mut self) -> Self {
        self.sanitized = true;
        self
    }

    fn flags(&self) -> impl Iterator<Item = &'static str> {
        FLAGS.into_iter().chain(self.sanitized.then_some(SANITIZER))
    }

    /// Uses `text` instead of the file at `path`, relative to the crate.
    pub fn replace(mut self, path: &Path, text: String) -> Self {
        self.replaced.insert(path.to_owned(), text);
        self
    }

    /// Builds only the kernels of these sources.
    pub fn only(mut self, sources: &[&str]) -> Self {
        self.only = sources.iter().map(|name| (*name).to_owned()).collect();
        self
    }

    /// Builds what is missing; the path of the library. Its folder can be put on `LD_LIBRARY_PATH`.
    ///
    /// # Errors
    /// No compiler, or the sources do not compile.
    pub fn build(&self) -> Result<PathBuf, BuildError> {
        if cfg!(not(target_arch = "x86_64")) {
            return Err(BuildError::WrongMachine);
        }
        let compiler = compiler().ok_or(BuildError::NoCompiler)?;
        // Tests of one process ask for the unchanged library at once: the first builds it, the others find it.
        let _building = self.replaced.is_empty().then(|| {
            static UNCHANGED: Mutex<()> = Mutex::new(());
            UNCHANGED.lock().unwrap_or_else(PoisonError::into_inner)
        });
        create(&self.out)?;
        let shared = self.shared_text()?;
        let mut objects = Vec::new();
        let mut pending = Vec::new();
        for source in self.sources()? {
            let text = self.text(&source)?;
            let key = self.key(&compiler, &[&shared, &text]);
            let object = self.out.join(format!("{}-{}.o", stem(&source), &key[..16]));
            if !object.exists() {
                pending.push((source, object.clone()));
            }
            objects.push(object);
        }
        let tree = self.tree()?;
        let lanes = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(4);
        let chunk = pending.len().div_ceil(lanes).max(1);
        std::thread::scope(|scope| {
            let workers: Vec<_> = pending
                .chunks(chunk)
                .map(|part| {
                    let (tree, compiler) = (&tree, &compiler);
                    scope.spawn(move || {
                        part.iter().try_for_each(|(source, object)| {
                            self.compile(compiler, &tree.join(source), object)
                        })
                    })
                })
                .collect();
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().unwrap_or(Err(BuildError::NoCompiler)))
        })?;
        if tree != self.root {
            // A copy that nobody needs any more; failing to remove it costs a megabyte.
            std::fs::remove_dir_all(&tree).ok();
        }
        let names: Vec<_> = objects
            .iter()
            .map(|o| o.to_string_lossy().into_owned())
            .collect();
        let folder = self
            .out
            .join(&sha256(format!("static\0{}", names.join("\0")).as_bytes())[..16]);
        let library = folder.join("libcuda.so.1");
        if !library.exists() {
            create(&folder)?;
            let temporary = folder.join(format!("libcuda.{}", unique()));
            let mut command = Command::new(&compiler);
            command
                .args(self.sanitized.then_some(SANITIZER))
                .args(["-shared", "-pthread", "-Wl,-soname,libcuda.so.1"])
                // It must load where there is a C library alone, as in the engine's image.
                .args(["-static-libstdc++", "-static-libgcc", "-o"])
                .arg(&temporary)
                .args(&objects);
            finish(command, &library)?;
            std::fs::rename(&temporary, &library).map_err(|source| file(&library, source))?;
        }
        Ok(library)
    }

    /// Builds an emulated `libnccl.so.2` as well, beside the driver; the path of the driver.
    ///
    /// # Errors
    /// See [`Emulation::build`].
    pub fn build_with_nccl(&self) -> Result<PathBuf, BuildError> {
        let driver = self.build()?;
        let compiler = compiler().ok_or(BuildError::NoCompiler)?;
        let source = Path::new("emulation/nccl.cpp");
        let text = self.text(source)?;
        let key = self.key(&compiler, &[&text]);
        let folder = driver.parent().unwrap_or(Path::new("."));
        let built = folder.join(format!("nccl-{}.built", &key[..16]));
        let library = folder.join(NCCL_LIBRARY);
        if !built.exists() {
            let object = folder.join(format!("nccl-{}.o", &key[..16]));
            self.compile(&compiler, &self.root.join(source), &object)?;
            let temporary = folder.join(format!("libnccl.{}", unique()));
            let mut command = Command::new(&compiler);
            command
                .args(self.sanitized.then_some(SANITIZER))
                .args(["-shared", "-pthread", "-Wl,-soname,libnccl.so.2"])
                .args(["-static-libstdc++", "-static-libgcc", "-o"])
                .arg(&temporary)
                // It queues its work on the driver's streams.
                .args([&object, &driver])
                .arg("-Wl,-rpath,$ORIGIN");
            finish(command, &library)?;
            std::fs::rename(&temporary, &library).map_err(|source| file(&library, source))?;
            std::fs::write(&built, []).map_err(|source| file(&built, source))?;
        }
        Ok(driver)
    }

    /// Of what goes into an object.
    fn key(&self, compiler: &str, texts: &[&str]) -> String {
        let flags: Vec<_> = self.flags().collect();
        sha256(format!("{compiler}\0{flags:?}\0{}", texts.join("\0")).as_bytes())
    }

    fn compile(&self, compiler: &str, source: &Path, object: &Path) -> Result<(), BuildError> {
        let temporary = object.with_extension(format!("{}.tmp", unique()));
        let mut command = Command::new(compiler);
        command
            .args(self.flags())
            .args(["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-c", "-o"])
            .arg(&temporary)
            .args(["-x", "c++"])
            .arg(source);
        finish(command, source)?;
        std::fs::rename(&temporary, object).map_err(|source| file(object, source))
    }

    /// Sources to compile, relative to the root.
    fn sources(&self) -> Result<Vec<PathBuf>, BuildError> {
        let mut sources = vec![
            PathBuf::from("emulation/machine.cpp"),
            PathBuf::from("emulation/driver.cpp"),
        ];
        for folder in ["cuda/sm80", "cuda/sm90"] {
            for name in list(&self.root.join(folder))? {
                let path = Path::new(folder).join(&name);
                let wanted =
                    self.only.is_empty() || self.only.iter().any(|only| *only == stem(&path));
                if name.ends_with(".cu") && wanted {
                    sources.push(path);
                }
            }
        }
        Ok(sources)
    }

    fn text(&self, path: &Path) -> Result<String, BuildError> {
        match self.replaced.get(path) {
            Some(text) => Ok(text.clone()),
            None => {
                let path = self.root.join(path);
                std::fs::read_to_string(&path).map_err(|source| file(&path, source))
            }
        }
    }

    /// All headers in one text: any of them changes every object.
    fn shared_text(&self) -> Result<String, BuildError> {
        let mut all = String::new();
        for folder in ["cuda/common", "cuda/sm80", "cuda/sm90", "emulation"] {
            for name in list(&self.root.join(folder))? {
                if name.ends_with(".h") {
                    all.push_str(&name);
                    all.push_str(&self.text(&Path::new(folder).join(name))?);
                }
            }
        }
        Ok(all)
    }

    /// The folder to compile in: the crate itself, or a copy with the replaced files.
    fn tree(&self) -> Result<PathBuf, BuildError> {
        if self.replaced.is_empty() {
            return Ok(self.root.clone());
        }
        let key: Vec<_> = self
            .replaced
            .iter()
            .map(|(p, t)| format!("{}\0{t}", p.display()))
            .collect();
        let tree = self
            .out
            .join(format!("tree-{}", &sha256(key.join("\0").as_bytes())[..16]));
        for folder in ["cuda/common", "cuda/sm80", "cuda/sm90", "emulation"] {
            create(&tree.join(folder))?;
            for name in list(&self.root.join(folder))? {
                let path = Path::new(folder).join(&name);
                if self.root.join(&path).is_file() {
                    let to = tree.join(&path);
                    std::fs::write(&to, self.text(&path)?).map_err(|source| file(&to, source))?;
                }
            }
        }
        Ok(tree)
    }
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn file(path: &Path, source: io::Error) -> BuildError {
    BuildError::File {
        path: path.to_owned(),
        source,
    }
}

fn create(path: &Path) -> Result<(), BuildError> {
    std::fs::create_dir_all(path).map_err(|source| file(path, source))
}

/// Sorted names in a folder; none when there is no such folder.
fn list(path: &Path) -> Result<Vec<String>, BuildError> {
    if !path.is_dir() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|source| file(path, source))? {
        let entry = entry.map_err(|source| file(path, source))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// `CXX`, or the first of the usual names that answers.
fn compiler() -> Option<String> {
    std::env::var("CXX")
        .into_iter()
        .chain(["g++", "clang++", "c++"].map(str::to_owned))
        .find(|name| {
            Command::new(name)
                .arg("--version")
                .output()
                .is_ok_and(|output| output.status.success())
        })
}

/// A name that no other build on this machine uses now.
fn unique() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{}-{count}", std::process::id())
}

fn finish(mut command: Command, path: &Path) -> Result<(), BuildError> {
    let output = command.output().map_err(|source| file(path, source))?;
    if output.status.success() {
        return Ok(());
    }
    Err(BuildError::Compile {
        path: path.to_owned(),
        message: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
