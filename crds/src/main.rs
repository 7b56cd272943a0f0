//! Writes the generated files into the repository.

use std::path::Path;

use anyhow::Context;

fn main() -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("the crate lies in the repository")?;
    for file in crds::files()? {
        let path = root.join(file.path);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("failed to create {}", folder.display()))?;
        }
        std::fs::write(&path, &file.text)
            .with_context(|| format!("failed to write {}", path.display()))?;
        println!("{} ({} bytes)", file.path, file.text.len());
    }
    Ok(())
}
