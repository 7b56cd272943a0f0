//! The emulated driver under the address sanitizer: its own accesses and the kernels', locals included, and reads of the few
//! bytes between the end of a buffer and its guard page.
//!
//! The sanitizer has to be loaded before anything else, so tests run this program again. All tests under it take minutes; see
//! docs/kernels/emulation.md.

use std::path::{Path, PathBuf};
use std::process::Command;

use kernels::emulation::Emulation;

use crate::harness::{build_folder, driver};

/// The compiler's library, or none where it has none.
fn library() -> Option<PathBuf> {
    if std::env::var_os("KERNELS_DRIVER").is_some() {
        return None;
    }
    driver()?;
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    let asked = Command::new(compiler)
        .arg("-print-file-name=libasan.so")
        .output();
    let path = PathBuf::from(String::from_utf8(asked.ok()?.stdout).ok()?.trim());
    // A compiler without it prints the name as it was.
    let found = path.is_absolute().then_some(path);
    if found.is_none() {
        eprintln!("skipped: the compiler has no address sanitizer");
    }
    found
}

/// Runs a test of this program with a sanitized driver; whether it passed, and what was said.
fn run(sanitizer: &Path, emulation: Emulation, tests: &[&str]) -> (bool, String) {
    let driver = emulation.sanitized().build().expect("it compiles");
    let output = Command::new(std::env::current_exe().expect("this test"))
        .args(tests)
        .arg("--nocapture")
        .env("KERNELS_DRIVER", driver)
        .env("LD_PRELOAD", sanitizer)
        // Faults of kernels are the emulator's to report.
        .env(
            "ASAN_OPTIONS",
            "detect_leaks=0:handle_segv=0:handle_sigbus=0:handle_sigill=0:allow_user_segv_handler=1",
        )
        .output()
        .expect("this test runs");
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

const SOURCE: &str = "cuda/sm80/share_columns.cu";

fn only() -> Emulation {
    Emulation::new(&build_folder()).only(&["share_columns", "rms_norm_bf16"])
}

/// With `line` at the beginning of the kernel.
fn broken(line: &str) -> Emulation {
    let source = Path::new(SOURCE);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join(source)).expect("the kernel");
    let first = "    const int row = block_x()";
    assert!(text.contains(first));
    let text = text.replacen(first, &format!("{line}\n{first}"), 1);
    only().replace(source, text)
}

#[test]
fn kernels_that_are_right_are_clean_under_the_address_sanitizer() {
    let Some(sanitizer) = library() else { return };
    // Barriers, shuffles, shared memory and switches between threads are in them.
    let (passed, said) = run(&sanitizer, only(), &["ranks::columns", "rows::norm_adds"]);
    assert!(passed, "{said}");
    assert!(said.contains("2 passed"), "{said}");
}

#[test]
fn the_address_sanitizer_sees_what_guard_pages_and_canaries_do_not() {
    let Some(sanitizer) = library() else { return };
    for (line, words) in [
        // A local array, by a pointer whose bounds the compiler has lost.
        (
            "    volatile unsigned char spare[16]; volatile unsigned char* end = spare + (p.units ? 16 : 0); *end = 1;",
            "stack-buffer-overflow",
        ),
        // The byte behind the rows, which no guard page protects where they do not end at one.
        (
            "    volatile unsigned char* last = p.rows + (int64_t)p.count * p.units * p.unit_bytes; if ((uintptr_t)last % 16) (void)*last;",
            "READ of size 1",
        ),
    ] {
        let (passed, said) = run(&sanitizer, broken(line), &["ranks::columns"]);
        assert!(!passed, "{words} was not seen");
        assert!(
            said.contains("AddressSanitizer") && said.contains(words),
            "{said}"
        );
        assert!(said.contains("share_columns"), "{said}");
    }
}
