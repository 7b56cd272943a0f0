//! Weights in a packed file: written as the kernels read them, and used from the mapping without a copy.
//!
//! Invariant: the sections of a file are those that the model and the form of its weights call for, in the order of the
//! model's tensors. The layout is the same on every instruction set; a change of it must change [`LAYOUT`].

use std::path::Path;
use std::sync::OnceLock;

use engine_load::{
    LoadError, PACKED_FILE, PackedHeader, PackedModel, PackedWriter, Progress, Section,
    TensorSource,
};
use engine_memory::{IntegerFormat, ResidentDtype};
use engine_model::{Model, WeightId};
use engine_spec::ModelConfig;
use sha2::{Digest, Sha256};

use crate::packed::{LINE, Packed};
use crate::pool::Pool;
use crate::quantised::{BLOCK, Integers, block_lines};
use crate::store::{Line, Plain, Store};
use crate::weights::{
    Matrix, Values, Weight, Weights, absorbed, check, convert, form, is_looked_up,
};

/// Row-major floats, panels of bfloat16 and blocks of integers, in the byte order of this machine.
const LAYOUT: &str = if cfg!(target_endian = "little") {
    "cpu-1-little-endian"
} else {
    "cpu-1-big-endian"
};
/// Tensors that are converted together: enough for all threads, few enough to stay small beside the model.
const TOGETHER: usize = 64;

/// How weights are kept, in the words of `--dtype` and `--quantization`.
fn words(resident: ResidentDtype) -> String {
    match resident {
        ResidentDtype::Float32 => "float32".into(),
        ResidentDtype::Bfloat16 => "bfloat16".into(),
        ResidentDtype::Float8E4m3(_) => "float8".into(),
        ResidentDtype::Integer(IntegerFormat::Int8, _) => "int8".into(),
        ResidentDtype::Integer(IntegerFormat::Int4 { group }, _) => {
            format!("int4, groups of {group}")
        }
    }
}

fn is_bfloat16(form: ResidentDtype) -> bool {
    matches!(form, ResidentDtype::Bfloat16 | ResidentDtype::Float8E4m3(_))
}

/// Matrices of a model, before their weights are there.
struct Part {
    name: String,
    form: ResidentDtype,
    /// Its bfloat16 values lie in panels.
    is_packed: bool,
    /// How many matrices of the same shape.
    count: usize,
    rows: usize,
    columns: usize,
}

impl Part {
    /// Of all tensors, in order.
    fn all(model: &Model, dtype: ResidentDtype) -> Vec<Vec<Self>> {
        let absorbed = absorbed(model);
        let tensors = model.tensors.iter().enumerate();
        tensors
            .map(|(index, spec)| {
                if let Some(attention) = absorbed[index] {
                    let part = |part: &str, rows: usize, columns: usize| Self {
                        name: format!("{}#{part}", spec.name),
                        form: dtype.head(),
                        is_packed: is_bfloat16(dtype.head()),
                        count: attention.heads,
                        rows,
                        columns,
                    };
                    return vec![
                        part("key", attention.latent, attention.nope),
                        part("value", attention.value, attention.latent),
                    ];
                }
                let (rows, columns) = match spec.shape.as_slice() {
                    [rows, columns] => (*rows, *columns),
                    other => (1, other.iter().product()),
                };
                let id = WeightId(index as u32);
                let form = form(dtype, model, id);
                vec![Self {
                    name: spec.name.clone(),
                    form,
                    is_packed: is_bfloat16(form) && !is_looked_up(model, id),
                    count: 1,
                    rows,
                    columns,
                }]
            })
            .collect()
    }

    fn bytes(&self) -> usize {
        let elements = self.count * self.rows * self.columns;
        match self.form {
            _ if self.is_packed => self.pairs().div_ceil(LINE) * size_of::<Line>(),
            ResidentDtype::Float32 => elements * 4,
            ResidentDtype::Bfloat16 | ResidentDtype::Float8E4m3(_) => elements * 2,
            ResidentDtype::Integer(format, _) => {
                let blocks = self.count * self.rows.div_ceil(BLOCK);
                blocks * block_lines(format, self.columns) * size_of::<Line>()
            }
        }
    }

    fn pairs(&self) -> usize {
        self.count * self.rows * self.columns.div_ceil(2)
    }

    fn section(&self) -> Section {
        let panels = if self.is_packed { ", panels" } else { "" };
        Section {
            name: self.name.clone(),
            form: format!("{}{panels}", words(self.form)),
            shape: [self.count, self.rows, self.columns].map(|size| size as u64),
            bytes: self.bytes() as u64,
            sha256: String::new(),
        }
    }

    /// The matrix over section `index` of `packed`, which was checked to be this part's.
    fn map(&self, packed: &PackedModel, index: usize) -> Result<Matrix, LoadError> {
        let misplaced =
            || LoadError::Backend(format!("packed section {} is not aligned", self.name));
        let bytes = packed.section(index).ok_or_else(misplaced)?;
        fn store<T: Plain>(bytes: engine_load::Mapped) -> Option<Store<T>> {
            Store::mapped(bytes)
        }
        let values = match self.form {
            _ if self.is_packed => store(bytes).map(|lines| {
                Values::Packed(Packed::of(lines, self.pairs(), self.rows, self.columns))
            }),
            ResidentDtype::Float32 => store(bytes).map(Values::F32),
            ResidentDtype::Bfloat16 | ResidentDtype::Float8E4m3(_) => {
                store(bytes).map(Values::Bf16)
            }
            ResidentDtype::Integer(format, _) => store(bytes).map(|lines| {
                Values::Integer(Integers {
                    format,
                    columns: self.columns,
                    part_rows: self.rows,
                    lines,
                })
            }),
        };
        Ok(Matrix {
            rows: self.rows,
            columns: self.columns,
            values: values.ok_or_else(misplaced)?,
        })
    }
}

/// The header that a model calls for, digests left out.
fn header(
    config: &ModelConfig,
    parts: &[Vec<Part>],
    dtype: ResidentDtype,
) -> Result<PackedHeader, LoadError> {
    let text = serde_json::to_vec(config).map_err(|error| LoadError::Backend(error.to_string()))?;
    let digest = Sha256::digest(&text);
    Ok(PackedHeader {
        layout: LAYOUT.into(),
        config: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        form: words(dtype),
        sections: parts.iter().flatten().map(Part::section).collect(),
    })
}

/// Weights that are not packed yet.
#[derive(Clone, Copy)]
pub(crate) struct Unpacked<'a> {
    /// Of the directory that the file will be in.
    pub config: &'a ModelConfig,
    pub model: &'a Model,
    pub source: &'a dyn TensorSource,
    /// How an executor keeps them.
    pub dtype: ResidentDtype,
}

/// Writes weights to `path`.
///
/// # Errors
/// When a tensor cannot be converted or the file not written.
pub(crate) fn write(
    path: &Path,
    weights: Unpacked<'_>,
    pool: &mut Pool,
    progress: &Progress,
) -> Result<(), LoadError> {
    let Unpacked {
        config,
        model,
        source,
        dtype,
    } = weights;
    check(dtype, model)?;
    let parts = Part::all(model, dtype);
    let mut writer = PackedWriter::create(path, header(config, &parts, dtype)?)?;
    let absorbed = absorbed(model);
    progress.begin(source.stored_bytes(model));
    for first in (0..model.tensors.len()).step_by(TOGETHER) {
        let count = TOGETHER.min(model.tensors.len() - first);
        let slots: Vec<OnceLock<Weight>> = (0..count).map(|_| OnceLock::new()).collect();
        pool.run(count, &|offset| {
            let id = WeightId((first + offset) as u32);
            source.read(model, id, &mut |tensor| {
                // Each index is visited once, so the slot is empty.
                let _ = slots[offset].set(convert(tensor, model, id, dtype, absorbed[id.index()]));
                progress.add(tensor.stored_bytes());
            });
        })
        .map_err(|panic| LoadError::Backend(panic.to_string()))?;
        for weight in slots.iter().filter_map(OnceLock::get) {
            for part in weight.parts() {
                writer.put(part.values.as_stored())?;
            }
        }
    }
    writer.finish()
}

/// The weights of a packed file, mapped.
///
/// # Errors
/// When the file is of another layout, config or form than asked for.
pub(crate) fn open(
    packed: &PackedModel,
    config: &ModelConfig,
    model: &Model,
    dtype: ResidentDtype,
) -> Result<Weights, LoadError> {
    check(dtype, model)?;
    let parts = Part::all(model, dtype);
    compare(packed.header(), &header(config, &parts, dtype)?)?;
    let mut next = 0..;
    let mut map = |part: &Part| part.map(packed, next.next().unwrap_or_default());
    let weights = parts.iter().map(|parts| match parts.as_slice() {
        [key, value] => Ok(Weight::Absorbed {
            key: map(key)?,
            value: map(value)?,
        }),
        [part, ..] => map(part).map(Weight::Matrix),
        [] => Err(LoadError::Backend("a tensor without parts".into())),
    });
    Ok(Weights::new(weights.collect::<Result<_, _>>()?))
}

fn compare(found: &PackedHeader, expected: &PackedHeader) -> Result<(), LoadError> {
    let mismatch = |what: &str, found: &str, expected: &str, way_out: &str| {
        Err(LoadError::Malformed {
            file: PACKED_FILE.into(),
            problem: format!("{what} {found}, expected {expected}; {way_out}"),
        })
    };
    let again = "pack the model again with this engine";
    if found.layout != expected.layout {
        return mismatch("layout", &found.layout, &expected.layout, again);
    }
    if found.form != expected.form {
        let way_out = "serve it without --dtype and --quantization, or pack the model again";
        return mismatch("weights are", &found.form, &expected.form, way_out);
    }
    if found.config != expected.config {
        let what = "was packed for another config.json, of digest";
        return mismatch(what, &found.config, &expected.config, again);
    }
    // A prediction layer comes last, and may be there without being asked for.
    if found.sections.len() < expected.sections.len() {
        let counts = [found, expected].map(|header| header.sections.len().to_string());
        let way_out = "the prediction layer is missing where only drafts are asked for: pack the model again from files \
                       that have it, or serve it without --num-speculative-tokens";
        return mismatch("number of sections", &counts[0], &counts[1], way_out);
    }
    for (found, expected) in found.sections.iter().zip(&expected.sections) {
        let plain = |section: &Section| {
            let Section {
                name,
                form,
                shape,
                bytes,
                ..
            } = section;
            format!("{name} ({form}, {shape:?}, {bytes} bytes)")
        };
        let (found, expected) = (plain(found), plain(expected));
        if found != expected {
            return mismatch("section", &found, &expected, again);
        }
    }
    Ok(())
}
