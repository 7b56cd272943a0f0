//! Packed files that are not what they should be.

// A helper is no test, and may unwrap all the same.
#![allow(clippy::unwrap_used)]

use engine_load::{
    LoadError, PACKED_FILE, PackedHeader, PackedModel, PackedWriter, Progress, Section,
};
use engine_spec::ModelFault;
use proptest::prelude::*;

fn header(lengths: &[u64]) -> PackedHeader {
    PackedHeader {
        layout: "test-1".into(),
        config: "0".repeat(64),
        form: "bytes".into(),
        sections: lengths
            .iter()
            .enumerate()
            .map(|(index, bytes)| Section {
                name: format!("t{index}"),
                form: "bytes".into(),
                shape: [1, *bytes, 1],
                bytes: *bytes,
                sha256: String::new(),
            })
            .collect(),
    }
}

fn written(contents: &[&[u8]]) -> (tempfile::TempDir, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(PACKED_FILE);
    let lengths: Vec<u64> = contents.iter().map(|bytes| bytes.len() as u64).collect();
    let mut writer = PackedWriter::create(&path, header(&lengths)).unwrap();
    for bytes in contents {
        writer.put(bytes).unwrap();
    }
    writer.finish().unwrap();
    let bytes = std::fs::read(&path).unwrap();
    (dir, bytes)
}

fn open(bytes: &[u8]) -> Result<PackedModel, LoadError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(PACKED_FILE);
    std::fs::write(&path, bytes).unwrap();
    PackedModel::open(&path)
}

#[test]
fn what_was_written_is_read_back_at_aligned_places() {
    let contents: [&[u8]; 4] = [b"abc", b"", &[7; 64], &[9; 5000]];
    let (dir, _) = written(&contents);
    let packed = PackedModel::open(&dir.path().join(PACKED_FILE)).unwrap();
    for (index, expected) in contents.iter().enumerate() {
        let section = packed.section(index).unwrap();
        assert_eq!(&*section, *expected);
        assert!((section.as_ptr() as usize).is_multiple_of(64));
    }
    assert!(packed.section(4).is_none());
    packed.verify(&Progress::default()).unwrap();
    assert!(!dir.path().join("model.packed.partial").exists());
}

#[test]
fn every_truncation_and_every_flipped_bit_of_the_header_is_refused() {
    let (_dir, sound) = written(&[&[1; 100], &[2; 100]]);
    for length in (0..sound.len()).step_by(7) {
        let error = open(&sound[..length]).unwrap_err();
        // An empty file cannot be mapped on every system, which is as good a refusal.
        let told = error.fault() == Some(ModelFault::WeightsTruncated) || length == 0;
        assert!(told, "{length}: {error}");
    }
    let mut longer = sound.clone();
    longer.push(0);
    assert_eq!(
        open(&longer).unwrap_err().fault(),
        Some(ModelFault::WeightsTruncated)
    );
    let header = u64::from_le_bytes(sound[16..24].try_into().unwrap()) as usize;
    for at in (0..12).chain(16..56 + header) {
        let mut broken = sound.clone();
        broken[at] ^= 1;
        let error = open(&broken).unwrap_err();
        assert!(error.fault().is_some(), "byte {at}: {error}");
    }
}

#[test]
fn another_version_says_which_is_read() {
    let (_dir, mut bytes) = written(&[b"x"]);
    bytes[8] = 9;
    let message = open(&bytes).unwrap_err().to_string();
    assert!(
        message
            .contains("model.packed: version 9, this engine reads version 1; pack the model again"),
        "{message}"
    );
}

#[test]
fn a_writer_takes_only_what_it_announced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(PACKED_FILE);
    let mut writer = PackedWriter::create(&path, header(&[3])).unwrap();
    let message = writer.put(b"ab").unwrap_err().to_string();
    assert!(
        message.contains("section t0 has 2 bytes, 3 were announced"),
        "{message}"
    );
    let message = writer.finish().unwrap_err().to_string();
    assert!(message.contains("0 of 1 packed sections"), "{message}");
    assert!(!path.exists());
}

proptest! {
    #[test]
    fn garbage_is_refused_and_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..300), keep in 0usize..60) {
        let (_dir, sound) = written(&[b"abc"]);
        let keep = keep.min(bytes.len());
        bytes[..keep].copy_from_slice(&sound[..keep]);
        prop_assert!(open(&bytes).is_err());
    }
}
