//! Reads checkpoint files into [`HostTensor`]s, one at a time. Each shape is compared with the one that the graph expects before
//! memory is reserved for it.
//!
//! safetensors (one file, or shards with an index) are read, not memory-mapped: a file that is truncated or replaced
//! while it is read is an error, not a SIGBUS. pytorch_model.bin is read by candle's pickle reader, which runs no code.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io::{Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::DType;
use candle_core::pickle::PthTensors;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;

use super::file::{open_regular, read_text};
use crate::backend::HostTensor;

/// The longest safetensors header, as in the safetensors crate. It has room for hundreds of thousands of tensors.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The longest shard index: as many tensors as a header has room for.
const MAX_INDEX_BYTES: u64 = MAX_HEADER_BYTES;

/// Bytes per read. A multiple of every float type's width.
const BLOCK_BYTES: usize = 1 << 20;

/// The largest accepted magnitude of a weight. Trained weights stay below some hundreds. A flipped high exponent bit multiplies
/// an f32 weight by 2^128, which is often still finite.
const MAX_MAGNITUDE: f32 = 1e9;

/// Where a checkpoint is read from: a file, or bytes embedded in the binary.
trait ReadSeek: Read + Seek + Send {}
impl<T: Read + Seek + Send> ReadSeek for T {}

/// An open checkpoint. The graph takes its tensors by name; [`Weights::finish`] then reports tensors that were not
/// taken.
pub struct Weights {
    files: Vec<CheckpointFile>,
    /// The file of each tensor, and its name there.
    index: HashMap<String, (usize, String)>,
    taken: BTreeSet<String>,
    bytes: u64,
    on_progress: Box<dyn FnMut(u64) + Send>,
}

/// One file of a checkpoint.
struct CheckpointFile {
    name: String,
    content: Content,
}

enum Content {
    Safetensors { source: Box<dyn ReadSeek>, data_start: u64, metadata: Metadata },
    Pickle(PthTensors),
}

/// `model.safetensors.index.json`: the file name of each tensor's shard.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl ShardIndex {
    /// Reads an index. Shards must be in the index's own folder; an index that names a path is rejected.
    fn read(path: &Path) -> Result<Self> {
        let text = read_text(path, MAX_INDEX_BYTES)?;
        let index: Self =
            serde_json::from_str(&text).with_context(|| format!("{}: not a shard index", path.display()))?;
        for shard in index.shards() {
            let beside = Path::new(shard).file_name().is_some_and(|name| name == shard);
            ensure!(beside, "{}: shard {shard:?} is not the name of a file in the same folder", path.display());
        }
        Ok(index)
    }

    fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

/// The shard file names in a `model.safetensors.index.json`.
///
/// # Errors
/// The index cannot be read, or names a file outside its own folder.
pub fn shard_names(index: &Path) -> Result<Vec<String>> {
    Ok(ShardIndex::read(index)?.shards().into_iter().map(str::to_owned).collect())
}

impl Weights {
    /// Opens a `.safetensors` file, a `.safetensors.index.json` with its shards in the same folder, or a
    /// `pytorch_model.bin`.
    ///
    /// # Errors
    /// A file is missing, truncated, or not in the format of its name; the shards disagree with their index.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".index.json") {
            Self::open_shards(path)
        } else if name.ends_with(".safetensors") {
            let file = open_regular(path)?;
            Self::from_files(vec![CheckpointFile::safetensors(path.display().to_string(), Box::new(file))?])
        } else {
            let file_bytes = open_regular(path)?.metadata()?.len();
            let tensors = without_panic(|| PthTensors::new(path, None))
                .with_context(|| format!("{}: not a PyTorch checkpoint", path.display()))?;
            ensure!(
                !tensors.tensor_infos().is_empty(),
                "{}: no tensors found in this PyTorch checkpoint",
                path.display()
            );
            check_pickle_sizes(&tensors, file_bytes).with_context(|| path.display().to_string())?;
            Self::from_files(vec![CheckpointFile {
                name: path.display().to_string(),
                content: Content::Pickle(tensors),
            }])
        }
    }

    /// Reads a safetensors file that is embedded in the binary. Errors name it `name`.
    ///
    /// # Errors
    /// `bytes` is not a complete safetensors file.
    pub fn from_bytes(name: &str, bytes: &'static [u8]) -> Result<Self> {
        Self::from_files(vec![CheckpointFile::safetensors(name.to_owned(), Box::new(std::io::Cursor::new(bytes)))?])
    }

    fn open_shards(index_path: &Path) -> Result<Self> {
        let index = ShardIndex::read(index_path)?;
        let mut files = Vec::new();
        for shard in index.shards() {
            let path = index_path.with_file_name(shard);
            let file = open_regular(&path).with_context(|| format!("{}: shard {shard:?}", index_path.display()))?;
            files.push(CheckpointFile::safetensors(path.display().to_string(), Box::new(file))?);
        }
        let weights = Self::from_files(files)?;
        for (tensor, shard) in &index.weight_map {
            let held = weights.index.get(tensor).map(|&(i, _)| weights.files[i].name.as_str());
            ensure!(
                held.is_some_and(|name| Path::new(name) == index_path.with_file_name(shard)),
                "{}: tensor {tensor} is not in the shard {shard}",
                index_path.display()
            );
        }
        Ok(weights)
    }

    fn from_files(files: Vec<CheckpointFile>) -> Result<Self> {
        let mut weights = Self {
            files: Vec::new(),
            index: HashMap::new(),
            taken: BTreeSet::new(),
            bytes: 0,
            on_progress: Box::new(|_| {}),
        };
        for file in files {
            weights.add_file("", file)?;
        }
        Ok(weights)
    }

    fn add_file(&mut self, prefix: &str, file: CheckpointFile) -> Result<()> {
        for name in file.names() {
            let in_model = format!("{prefix}{name}");
            if let Some((other, _)) = self.index.insert(in_model, (self.files.len(), name.clone())) {
                bail!("tensor {name} is in {} and in {}", self.files[other].name, file.name);
            }
        }
        self.bytes += file.bytes();
        self.files.push(file);
        Ok(())
    }

    /// Opens another checkpoint, as [`Weights::open`] does, and adds its tensors with `prefix` before their names.
    ///
    /// # Errors
    /// Those of [`Weights::open`]; there already is a tensor of that name.
    pub fn add(&mut self, prefix: &str, path: &Path) -> Result<()> {
        for file in Self::open(path)?.files {
            self.add_file(prefix, file)?;
        }
        Ok(())
    }

    /// Bytes of tensor data in the checkpoint.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Calls `observe` with the size in bytes of each tensor that is read from now on.
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
    /// The tensor is missing, has another shape than `shape`, is not of a float type, or holds a NaN, an infinity or a
    /// magnitude above 1e9.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor> {
        let (file, in_file) = self.check_shape(name, shape)?;
        let file = &mut self.files[file];
        let (data, bytes) = file.read(&in_file).with_context(|| format!("{}: tensor {name}", file.name))?;
        if let Some(i) = data.iter().position(|value| value.is_nan() || value.abs() > MAX_MAGNITUDE) {
            bail!("{}: tensor {name} holds {} at element {i}; the file is damaged", file.name, data[i]);
        }
        self.taken.insert(name.to_owned());
        (self.on_progress)(bytes);
        Ok(HostTensor { shape: shape.to_vec(), data })
    }

    /// Looks a tensor up and compares its shape, without reading it. Returns the index of its file, and its name there.
    fn check_shape(&self, name: &str, shape: &[usize]) -> Result<(usize, String)> {
        let Some((file, name_in_file)) = self.index.get(name).cloned() else {
            let files: Vec<&str> = self.files.iter().map(|f| f.name.as_str()).collect();
            bail!("{}: tensor {name} is missing; config.json asks for it with shape {shape:?}", files.join(", "));
        };
        let (found, in_file) = (self.files[file].shape(&name_in_file), &self.files[file].name);
        ensure!(found == shape, "{in_file}: tensor {name} has shape {found:?}; config.json asks for {shape:?}");
        Ok((file, name_in_file))
    }

    /// Reads several tensors, each of shape `shape`, and concatenates them along the first dimension:
    /// `[names.len() * shape[0], ...]`.
    ///
    /// # Errors
    /// As [`Weights::take`].
    pub fn take_stacked(&mut self, names: &[String], shape: &[usize]) -> Result<HostTensor> {
        // Before memory is reserved: the shape comes from config.json.
        for name in names {
            self.check_shape(name, shape)?;
        }
        let mut data = Vec::with_capacity(names.len() * shape.iter().product::<usize>());
        for name in names {
            data.extend_from_slice(&self.take(name, shape)?.data);
        }
        let mut stacked = shape.to_vec();
        stacked[0] *= names.len();
        Ok(HostTensor { shape: stacked, data })
    }

    /// Checks that every tensor has been taken, except those whose names `unused` accepts.
    ///
    /// # Errors
    /// The checkpoint has other tensors: its architecture is not the one that config.json describes.
    pub fn finish(self, unused: impl Fn(&str) -> bool) -> Result<()> {
        let mut extra: Vec<&String> =
            self.index.keys().filter(|name| !self.taken.contains(*name) && !unused(name)).collect();
        extra.sort();
        if let Some(first) = extra.first() {
            let file = &self.files[self.index[*first].0].name;
            bail!(
                "{file}: tensor {first} has no place in this architecture ({} such tensors); \
                 config.json does not describe these weights",
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

impl CheckpointFile {
    fn safetensors(name: String, mut source: Box<dyn ReadSeek>) -> Result<Self> {
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

    /// The tensor's values, and its size in the file in bytes.
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

/// Turns a panic of candle's pickle reader into an error. The reader runs no code of the file, but some damaged files
/// make it panic.
fn without_panic<T>(read: impl FnOnce() -> candle_core::Result<T>) -> Result<T> {
    let outcome = catch_unwind(AssertUnwindSafe(read));
    Ok(outcome.map_err(|_| anyhow!("its pickle is damaged"))??)
}

/// Rejects tensors that are larger than their file, before memory is reserved for them. PyTorch stores data
/// uncompressed.
fn check_pickle_sizes(tensors: &PthTensors, file_bytes: u64) -> Result<()> {
    for (name, info) in tensors.tensor_infos() {
        let mut sizes = info.layout.dims().iter().map(|&size| size as u64);
        let bytes = sizes.try_fold(info.dtype.size_in_bytes() as u64, u64::checked_mul);
        ensure!(
            bytes.is_some_and(|bytes| bytes <= file_bytes),
            "tensor {name} has shape {:?}, which is more than the file's {file_bytes} bytes",
            info.layout.dims()
        );
    }
    Ok(())
}

/// Reads the header and compares its tensors with the length of the file, so that a truncated file is rejected at once.
/// Returns the offset of the data, and the header.
fn read_header(source: &mut Box<dyn ReadSeek>) -> Result<(u64, Metadata)> {
    let length = source.seek(SeekFrom::End(0))?;
    source.seek(SeekFrom::Start(0))?;
    let mut prefix = [0; 8];
    source.read_exact(&mut prefix).context("the file ends before its header")?;
    let header_bytes = u64::from_le_bytes(prefix);
    ensure!(
        header_bytes <= MAX_HEADER_BYTES,
        "its header length is {header_bytes} bytes; the limit is {MAX_HEADER_BYTES}"
    );
    ensure!(header_bytes + 8 <= length, "its header length is {header_bytes} bytes, but the file has {length}");
    let mut header = vec![0; header_bytes as usize];
    source.read_exact(&mut header)?;
    let metadata: Metadata = serde_json::from_slice(&header).context("its header is damaged")?;
    let data_start = 8 + header_bytes;
    let expected = data_start + metadata.data_len() as u64;
    ensure!(length == expected, "it has {length} bytes, but its header describes {expected}; download it again");
    Ok((data_start, metadata))
}

/// Reads `bytes` bytes of little-endian floats as f32, a block at a time: only the f32 values are in memory as a whole.
fn read_floats(source: &mut dyn ReadSeek, dtype: Dtype, bytes: usize) -> Result<Vec<f32>> {
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

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    /// A checkpoint of one f32 tensor, `[2, 2]`, that ends in `last`.
    fn weights(last: f32) -> Weights {
        let data: Vec<u8> = [1.0, 2.0, 3.0, last].iter().flat_map(|value: &f32| value.to_le_bytes()).collect();
        let view = TensorView::new(Dtype::F32, vec![2, 2], &data).unwrap();
        let bytes = safetensors::serialize([("weight", view)], None).unwrap();
        Weights::from_bytes("model.safetensors", bytes.leak()).unwrap()
    }

    #[test]
    fn stacked_tensors_are_compared_with_the_file_before_memory_is_reserved() {
        let names = ["weight", "weight", "weight"].map(str::to_owned);
        // Reserving this shape would panic.
        let error = weights(4.0).take_stacked(&names, &[1 << 30, 1 << 30]).unwrap_err().to_string();
        assert!(error.contains("tensor weight has shape [2, 2]"), "{error}");
        assert_eq!(weights(4.0).take_stacked(&names, &[2, 2]).unwrap().shape, [6, 2]);
    }

    #[test]
    fn a_pickled_tensor_that_is_larger_than_its_file_is_rejected_before_memory_is_reserved() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/xlmr-pickle/pytorch_model.bin");
        let mut bytes = std::fs::read(fixture).unwrap();
        // The word embedding's shape, [300, 64], becomes [65535, 64]: 8 MB of f16 in a file of 280 KB.
        let (shape, size) = (b"M,\x01K@\x86", [0xff, 0xff]);
        let at = bytes.windows(shape.len()).position(|window| window == shape).unwrap();
        bytes[at + 1..at + 3].copy_from_slice(&size);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pytorch_model.bin");
        std::fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", Weights::open(&path).unwrap_err());
        assert!(error.contains("pytorch_model.bin") && error.contains("shape [65535, 64]"), "{error}");
    }

    #[test]
    #[cfg(unix)]
    fn a_checkpoint_that_is_a_device_is_rejected_and_not_read() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"] {
            let path = folder.path().join(name);
            std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
            let error = format!("{:#}", Weights::open(&path).unwrap_err());
            assert!(error.contains(name) && error.contains("not a regular file"), "{error}");
        }
    }

    #[test]
    fn implausibly_large_weights_are_rejected_with_the_tensor_name() {
        assert!(weights(500.0).take("weight", &[2, 2]).is_ok());
        for value in [3e38, -3e38, f32::NAN, f32::INFINITY] {
            let error = weights(value).take("weight", &[2, 2]).unwrap_err().to_string();
            assert!(error.contains("model.safetensors: tensor weight holds"), "{error}");
        }
    }
}
