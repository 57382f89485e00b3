//! Checkpoint files -> [`HostTensor`]s, one at a time, each checked against the shape that the graph expects.
//!
//! safetensors (one file, or shards with an index) are read, not mapped: a file that is cut or replaced under us is an
//! error here and never a SIGBUS. pytorch_model.bin goes through candle's reader, which runs no code.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::DType;
use candle_core::pickle::PthTensors;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;

use crate::backend::HostTensor;

/// safetensors refuses longer headers too; some 100,000 tensors fit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Read at a time; a multiple of every float's width.
const BLOCK_BYTES: usize = 1 << 20;

/// Something that a checkpoint is read from: a file, or bytes in the binary.
trait Source: Read + Seek + Send {}
impl<T: Read + Seek + Send> Source for T {}

/// A checkpoint being read. The graph takes its tensors by name; [`Weights::finish`] then says what nobody asked for.
pub struct Weights {
    files: Vec<Checkpoint>,
    index: HashMap<String, usize>,
    taken: BTreeSet<String>,
    bytes: u64,
    on_progress: Box<dyn FnMut(u64) + Send>,
}

/// One file of it.
struct Checkpoint {
    name: String,
    content: Content,
}

enum Content {
    Safetensors { source: Box<dyn Source>, data_start: u64, metadata: Metadata },
    Pickle(PthTensors),
}

/// `model.safetensors.index.json`: which shard holds which tensor.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl ShardIndex {
    /// Reads an index. A shard lies beside it: an index that leads elsewhere is refused.
    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let index: Self =
            serde_json::from_str(&text).with_context(|| format!("{}: not a shard index", path.display()))?;
        for shard in index.shards() {
            let beside = Path::new(shard).file_name().is_some_and(|name| name == shard);
            ensure!(beside, "{}: {shard:?} is not the name of a file beside it", path.display());
        }
        Ok(index)
    }

    fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

/// The files that a `model.safetensors.index.json` names.
///
/// # Errors
/// An index that cannot be read, or that names anything but files beside it.
pub fn shard_names(index: &Path) -> Result<Vec<String>> {
    Ok(ShardIndex::read(index)?.shards().into_iter().map(str::to_owned).collect())
}

impl Weights {
    /// Opens a `.safetensors` file, a `.safetensors.index.json` with its shards beside it, or a `pytorch_model.bin`.
    ///
    /// # Errors
    /// A file that is missing, cut, or not in the format that its name says; shards that disagree with their index.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".index.json") {
            Self::open_shards(path)
        } else if name.ends_with(".safetensors") {
            let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            Self::from_checkpoints(vec![Checkpoint::safetensors(path.display().to_string(), Box::new(file))?])
        } else {
            let tensors = without_panic(|| PthTensors::new(path, None))
                .with_context(|| format!("{}: not a PyTorch checkpoint", path.display()))?;
            ensure!(
                !tensors.tensor_infos().is_empty(),
                "{}: no tensors found in this PyTorch checkpoint",
                path.display()
            );
            Self::from_checkpoints(vec![Checkpoint {
                name: path.display().to_string(),
                content: Content::Pickle(tensors),
            }])
        }
    }

    /// Reads a safetensors file that is part of the binary.
    ///
    /// # Errors
    /// Bytes that are not a safetensors file.
    pub fn from_bytes(name: &str, bytes: &'static [u8]) -> Result<Self> {
        Self::from_checkpoints(vec![Checkpoint::safetensors(name.to_owned(), Box::new(std::io::Cursor::new(bytes)))?])
    }

    fn open_shards(index_path: &Path) -> Result<Self> {
        let index = ShardIndex::read(index_path)?;
        let mut files = Vec::new();
        for shard in index.shards() {
            let path = index_path.with_file_name(shard);
            let file = File::open(&path).with_context(|| {
                format!("{} names the shard {}, which cannot be opened", index_path.display(), path.display())
            })?;
            files.push(Checkpoint::safetensors(path.display().to_string(), Box::new(file))?);
        }
        let weights = Self::from_checkpoints(files)?;
        for (tensor, shard) in &index.weight_map {
            let held = weights.index.get(tensor).map(|&i| weights.files[i].name.as_str());
            ensure!(
                held.is_some_and(|name| name.ends_with(shard.as_str())),
                "{}: tensor {tensor} is not in the shard {shard}",
                index_path.display()
            );
        }
        Ok(weights)
    }

    fn from_checkpoints(files: Vec<Checkpoint>) -> Result<Self> {
        let mut index = HashMap::new();
        for (i, file) in files.iter().enumerate() {
            for name in file.names() {
                if let Some(other) = index.insert(name.clone(), i) {
                    bail!("tensor {name} is in {} and in {}", files[other].name, file.name);
                }
            }
        }
        let bytes = files.iter().map(Checkpoint::bytes).sum();
        Ok(Self { files, index, taken: BTreeSet::new(), bytes, on_progress: Box::new(|_| {}) })
    }

    /// Bytes of tensor data in the checkpoint.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Calls `observe` with the bytes of each tensor read from now on.
    pub fn on_progress(&mut self, observe: impl FnMut(u64) + Send + 'static) {
        self.on_progress = Box::new(observe);
    }

    /// Whether the checkpoint has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Reads one tensor as f32.
    ///
    /// # Errors
    /// It is missing, has another shape than `shape`, is not a float, or holds a NaN or an infinity.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor> {
        let Some(&file) = self.index.get(name) else {
            let files: Vec<&str> = self.files.iter().map(|f| f.name.as_str()).collect();
            bail!("{}: tensor {name} is missing; config.json asks for it with shape {shape:?}", files.join(", "));
        };
        let file = &mut self.files[file];
        let found = file.shape(name);
        ensure!(found == shape, "{}: tensor {name} has shape {found:?}; config.json asks for {shape:?}", file.name);
        let (data, bytes) = file.read(name).with_context(|| format!("{}: tensor {name}", file.name))?;
        if let Some(at) = data.iter().position(|v| !v.is_finite()) {
            bail!("{}: tensor {name} holds {} at element {at}; the file is damaged", file.name, data[at]);
        }
        self.taken.insert(name.to_owned());
        (self.on_progress)(bytes);
        Ok(HostTensor { shape: shape.to_vec(), data })
    }

    /// Reads several tensors of the same trailing shape and lays them under each other: `[rows * names, ...]`.
    ///
    /// # Errors
    /// As [`Weights::take`].
    pub fn take_stacked(&mut self, names: &[String], shape: &[usize]) -> Result<HostTensor> {
        let mut data = Vec::with_capacity(names.len() * shape.iter().product::<usize>());
        for name in names {
            data.extend_from_slice(&self.take(name, shape)?.data);
        }
        let mut stacked = shape.to_vec();
        stacked[0] *= names.len();
        Ok(HostTensor { shape: stacked, data })
    }

    /// Ends the reading: whatever nobody took is an error, but for the names that `harmless` knows.
    ///
    /// # Errors
    /// Names the tensors that the graph has no place for: the architecture is not the one that config.json claims.
    pub fn finish(self, harmless: impl Fn(&str) -> bool) -> Result<()> {
        let mut extra: Vec<&String> =
            self.index.keys().filter(|name| !self.taken.contains(*name) && !harmless(name)).collect();
        extra.sort();
        if let Some(first) = extra.first() {
            let file = &self.files[self.index[*first]].name;
            bail!(
                "{file}: tensor {first} has no place in this architecture ({} such tensors); config.json does not describe these weights",
                extra.len()
            );
        }
        Ok(())
    }
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Weights")
            .field("tensors", &self.index.len())
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Checkpoint {
    fn safetensors(name: String, mut source: Box<dyn Source>) -> Result<Self> {
        let content = read_header(&mut source).with_context(|| format!("{name}: not a complete safetensors file"))?;
        let (data_start, metadata) = content;
        Ok(Self { name, content: Content::Safetensors { source, data_start, metadata } })
    }

    fn names(&self) -> Vec<String> {
        match &self.content {
            Content::Safetensors { metadata, .. } => metadata.offset_keys(),
            Content::Pickle(tensors) => tensors.tensor_infos().keys().cloned().collect(),
        }
    }

    fn bytes(&self) -> u64 {
        match &self.content {
            Content::Safetensors { metadata, .. } => metadata.data_len() as u64,
            Content::Pickle(tensors) => tensors
                .tensor_infos()
                .values()
                .map(|t| (t.layout.shape().elem_count() * t.dtype.size_in_bytes()) as u64)
                .sum(),
        }
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        match &self.content {
            Content::Safetensors { metadata, .. } => metadata.info(name).map(|info| info.shape.clone()),
            Content::Pickle(tensors) => tensors.tensor_infos().get(name).map(|info| info.layout.dims().to_vec()),
        }
        .unwrap_or_default()
    }

    /// The tensor's values and its size in the file.
    fn read(&mut self, name: &str) -> Result<(Vec<f32>, u64)> {
        let tensor = match &mut self.content {
            Content::Pickle(tensors) => without_panic(|| tensors.get(name))?.context("vanished from the file")?,
            Content::Safetensors { source, data_start, metadata } => {
                let info = metadata.info(name).context("vanished from the header")?;
                let (start, end) = info.data_offsets;
                source.seek(SeekFrom::Start(*data_start + start as u64))?;
                let data = read_floats(source, info.dtype, end - start)?;
                return Ok((data, (end - start) as u64));
            }
        };
        ensure!(tensor.dtype().is_float(), "its type {:?} is not a float", tensor.dtype());
        let bytes = (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
        Ok((tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?, bytes))
    }
}

/// candle's pickle reader runs no code, but some damaged files make it panic.
fn without_panic<T>(read: impl FnOnce() -> candle_core::Result<T>) -> Result<T> {
    let outcome = catch_unwind(AssertUnwindSafe(read));
    Ok(outcome.map_err(|_| anyhow!("its pickle is damaged"))??)
}

/// Reads the header and holds it against the length of the file, so that a cut file is found before anything is computed.
fn read_header(source: &mut Box<dyn Source>) -> Result<(u64, Metadata)> {
    let length = source.seek(SeekFrom::End(0))?;
    source.seek(SeekFrom::Start(0))?;
    let mut prefix = [0; 8];
    source.read_exact(&mut prefix).context("the file ends before its header")?;
    let header_bytes = u64::from_le_bytes(prefix);
    ensure!(header_bytes <= MAX_HEADER_BYTES, "its header claims {header_bytes} bytes");
    ensure!(header_bytes + 8 <= length, "its header claims {header_bytes} bytes, the file has {length}");
    let mut header = vec![0; header_bytes as usize];
    source.read_exact(&mut header)?;
    let metadata: Metadata = serde_json::from_slice(&header).context("its header is damaged")?;
    let data_start = 8 + header_bytes;
    let expected = data_start + metadata.data_len() as u64;
    ensure!(length == expected, "it has {length} bytes, its header describes {expected}; download it again");
    Ok((data_start, metadata))
}

/// Reads `bytes` bytes of little-endian floats, a block at a time: the file's form is never in memory whole.
fn read_floats(source: &mut dyn Source, dtype: Dtype, bytes: usize) -> Result<Vec<f32>> {
    type Convert = fn(&[u8], &mut Vec<f32>);
    let (width, convert): (usize, Convert) = match dtype {
        Dtype::F64 => (8, |b, out| out.extend(b.as_chunks().0.iter().map(|&v| f64::from_le_bytes(v) as f32))),
        Dtype::F32 => (4, |b, out| out.extend(b.as_chunks().0.iter().map(|&v| f32::from_le_bytes(v)))),
        Dtype::F16 => (2, |b, out| out.extend(b.as_chunks().0.iter().map(|&v| f16::from_le_bytes(v).to_f32()))),
        Dtype::BF16 => (2, |b, out| out.extend(b.as_chunks().0.iter().map(|&v| bf16::from_le_bytes(v).to_f32()))),
        other => bail!("its type {other:?} is not one of F64, F32, F16 and BF16"),
    };
    let mut data = Vec::with_capacity(bytes / width);
    let mut block = vec![0; BLOCK_BYTES.min(bytes)];
    let mut left = bytes;
    while left > 0 {
        let block = &mut block[..BLOCK_BYTES.min(left)];
        source.read_exact(block).context("the file ends inside it")?;
        convert(block, &mut data);
        left -= block.len();
    }
    Ok(data)
}
