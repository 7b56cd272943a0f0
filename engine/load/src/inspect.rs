//! What a model is, from its config and headers alone.
//!
//! Invariant: no weight is read or fetched, whatever the size of the model; a hub or store is asked for the listing,
//! `config.json`, the index and the first bytes of each weight file. The same model gives the same facts and digest
//! wherever it is.

use std::path::{Path, PathBuf};

use engine_spec::{ModelConfig, ModelFacts};
use sha2::{Digest, Sha256};

use crate::checkpoint::{
    CONFIG_FILE, INDEX_FILE, Index, SINGLE_FILE, Shard, check, local_shards, parse_config,
};
use crate::download::{Client, Origin, RemoteFile, hex};
use crate::packed::{self, PACKED_FILE, PackedHeader, PackedModel};
use crate::source::{FetchSettings, Place, locate};
use crate::{LoadError, header, read_config};

/// Asked for at once of each weight file; most headers fit.
const HEADER_GUESS_BYTES: u64 = 256 << 10;

/// Facts of a local model: config and headers of `dir`, checked against each other.
///
/// The digest covers names, dtypes, shapes and places of all tensors and the sizes of all files: cheap, and different
/// for different layouts; it does not see a changed weight.
///
/// # Errors
/// As [`read_config`] and [`crate::Checkpoint::open`].
pub fn inspect(dir: &Path) -> Result<ModelFacts, LoadError> {
    let config = read_config(dir)?;
    let packed = dir.join(PACKED_FILE);
    if packed.is_file() {
        return packed_facts(config, PackedModel::open(&packed)?.header());
    }
    let shards = local_shards(dir)?;
    facts(config, &shards)
}

/// Facts of a model wherever it is, without fetching its weights.
///
/// # Errors
/// As [`crate::resolve`] and [`inspect`].
pub fn inspect_source(
    source: &str,
    revision: Option<&str>,
    settings: &FetchSettings,
) -> Result<ModelFacts, LoadError> {
    match locate(source, revision, settings)? {
        Place::Local(dir) => inspect(&dir),
        Place::Remote {
            origin,
            client,
            files,
            ..
        } => {
            let remote = Remote {
                origin: &*origin,
                client: &client,
                files: &files,
            };
            let config = remote.config()?;
            if let Some(file) = remote.find(PACKED_FILE) {
                let start = remote.start(file, packed::header_end)?;
                let (header, _) = packed::read_header(&start, file.bytes)?;
                return packed_facts(config, &header);
            }
            let shards = remote.shards()?;
            facts(config, &shards)
        }
    }
}

/// What `config.json` of a model says, wherever the model is; nothing else is fetched.
///
/// # Errors
/// As [`crate::resolve`] and [`read_config`].
pub fn source_config(
    source: &str,
    revision: Option<&str>,
    settings: &FetchSettings,
) -> Result<ModelConfig, LoadError> {
    match locate(source, revision, settings)? {
        Place::Local(dir) => read_config(&dir),
        Place::Remote {
            origin,
            client,
            files,
            ..
        } => Remote {
            origin: &*origin,
            client: &client,
            files: &files,
        }
        .config(),
    }
}

/// Facts of a packed model: those of its header.
fn packed_facts(config: ModelConfig, packed: &PackedHeader) -> Result<ModelFacts, LoadError> {
    let header =
        serde_json::to_vec(packed).map_err(|error| LoadError::Backend(error.to_string()))?;
    Ok(ModelFacts {
        weight_dtype: config.stored_dtype,
        weight_bytes: packed.bytes(),
        parameters: config.parameters(),
        digest: format!("sha256:{}", hex(&Sha256::digest(header))),
        shards: 1,
        tensors: packed.sections.len().try_into().unwrap_or_default(),
        config,
    })
}

fn facts(config: ModelConfig, shards: &[Shard]) -> Result<ModelFacts, LoadError> {
    let model = engine_model::build(&config);
    check(shards, &config, &model)?;
    let mut hash = Sha256::new();
    let mut facts = ModelFacts {
        weight_dtype: config.stored_dtype,
        config,
        weight_bytes: 0,
        parameters: 0,
        digest: String::new(),
        shards: 0,
        tensors: 0,
    };
    for shard in shards {
        hash.update(format!("{}\0{}\0", shard.file, shard.bytes));
        facts.weight_bytes += shard.bytes;
        facts.shards += 1;
        for (name, tensor) in &shard.header {
            let [begin, end] = [tensor.begin, tensor.end];
            hash.update(format!(
                "{name}\0{}\0{:?}\0{begin}\0{end}\0",
                tensor.dtype, tensor.shape
            ));
            facts.tensors += 1;
            let beside = ["_scale_inv", ".weight_scale", ".weight_shape"];
            if !beside.iter().any(|suffix| name.ends_with(suffix)) {
                let elements: u64 = tensor.shape.iter().map(|size| *size as u64).product();
                // Words of 32 bits hold several.
                let packed = facts
                    .config
                    .integers
                    .filter(|_| name.ends_with(".weight_packed"));
                facts.parameters +=
                    elements * packed.map_or(1, |integers| 32 / u64::from(integers.bits));
            }
        }
    }
    facts.digest = format!("sha256:{}", hex(&hash.finalize()));
    Ok(facts)
}

/// A model behind a server.
struct Remote<'a> {
    origin: &'a dyn Origin,
    client: &'a Client,
    files: &'a [RemoteFile],
}

impl Remote<'_> {
    fn config(&self) -> Result<ModelConfig, LoadError> {
        parse_config(&self.text(CONFIG_FILE)?, PathBuf::from(CONFIG_FILE))
    }

    fn find(&self, name: &str) -> Option<&RemoteFile> {
        self.files.iter().find(|file| file.name == name)
    }

    fn text(&self, name: &str) -> Result<String, LoadError> {
        let url = || self.origin.url(name);
        let what = format!("{name} of {}", self.origin.describe());
        self.client
            .text(&url, self.origin.authorization().as_deref(), &what)
    }

    fn shards(&self) -> Result<Vec<Shard>, LoadError> {
        if self.find(INDEX_FILE).is_some() {
            let index = Index::parse(&self.text(INDEX_FILE)?)?;
            let mut shards = Vec::new();
            for (name, tensor) in index.files()? {
                let file = self
                    .find(name)
                    .ok_or_else(|| index.absent(name, tensor, &self.origin.describe()))?;
                shards.push(self.shard(file)?);
            }
            index.check(shards.iter())?;
            return Ok(shards);
        }
        match self.find(SINGLE_FILE) {
            Some(file) => Ok(vec![self.shard(file)?]),
            None => Err(LoadError::Missing(format!(
                "{} has neither {SINGLE_FILE} nor {INDEX_FILE}",
                self.origin.describe()
            ))),
        }
    }

    /// The bytes of a file up to the end of its header, which `end` tells from the first of them.
    fn start(
        &self,
        file: &RemoteFile,
        end: impl FnOnce(&[u8]) -> Result<u64, LoadError>,
    ) -> Result<Vec<u8>, LoadError> {
        let RemoteFile { name, bytes, .. } = file;
        let mut start = match HEADER_GUESS_BYTES.min(*bytes) {
            0 => Vec::new(),
            guess => self.client.range(self.origin, name, 0, guess)?,
        };
        let (have, end) = (start.len() as u64, end(&start)?);
        if have < end {
            start.extend(self.client.range(self.origin, name, have, end)?);
        }
        Ok(start)
    }

    fn shard(&self, file: &RemoteFile) -> Result<Shard, LoadError> {
        let RemoteFile { name, bytes, .. } = file;
        let header_end = |start: &[u8]| Ok(8 + header::header_bytes(name, start, *bytes)?);
        let start = self.start(file, header_end)?;
        let end = header_end(&start)?;
        let Some(json) = start.get(8..end as usize) else {
            return Err(LoadError::Truncated {
                file: name.clone(),
                problem: format!("header of {end} bytes, the server sent {}", start.len()),
            });
        };
        Ok(Shard {
            file: name.clone(),
            bytes: *bytes,
            header: header::parse(name, json, *bytes)?,
        })
    }
}
