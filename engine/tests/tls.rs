//! The binary's TLS flags: files that cannot be served end it before it listens.

#![allow(missing_docs, clippy::unwrap_used)]

mod process;

use process::{golden, run};

#[test]
fn files_that_cannot_be_served_are_named_before_anything_is_loaded() {
    let model = golden("qwen2");
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = (folder.path().join("tls.crt"), folder.path().join("tls.key"));
    std::fs::write(&certificate, "no certificate").unwrap();
    let words = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let (model, certificate, key) = (words(model.path()), words(&certificate), words(&key));
    let serve = |flags: &[&str]| {
        let (is_served, text) = run(&[&["serve", "--model", &model], flags].concat());
        assert!(!is_served, "{text}");
        assert!(!text.contains("listening"), "{text}");
        text
    };
    let text = serve(&["--tls-cert-file", &certificate, "--tls-key-file", &key]);
    assert!(
        text.contains("--tls-cert-file: ") && text.contains("tls.key cannot be read"),
        "{text}"
    );
    std::fs::write(&key, "no key").unwrap();
    // The names that vLLM gives them.
    let text = serve(&["--ssl-certfile", &certificate, "--ssl-keyfile", &key]);
    assert!(
        text.contains("tls.crt holds no certificate in PEM"),
        "{text}"
    );
    let text = serve(&["--tls-cert-file", &certificate]);
    assert!(text.contains("--tls-key-file"), "{text}");
}
