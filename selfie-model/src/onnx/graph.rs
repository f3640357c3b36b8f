//! An ONNX file read back, and its graph computed from the definitions of ONNX's operators, in `f64` and without haste:
//! what the export is checked by. It knows the operators that we write, and nothing of our networks.

use super::messages::{Dimension, F32, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, attribute};
use super::{BATCH, EMBEDDING, IMAGES, IR_VERSION, LOGITS, OPSET, initializers, metadata, value};
use crate::error::{Error, Result, reading};
use crate::export::{Export, Outputs, normalised};
use prost::Message;
use rayon::prelude::*;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// A file, read back.
#[derive(Debug)]
pub(crate) struct OnnxFile {
    path: PathBuf,
    model: ModelProto,
}

/// What a value of the graph is.
#[derive(Debug, Clone, PartialEq)]
struct Tensor {
    shape: Vec<usize>,
    data: Vec<f64>,
}

/// Why a graph cannot be computed.
type Wrong = String;

impl OnnxFile {
    /// # Errors
    /// [`Error::Read`]; [`Error::Malformed`] for what is no message of ONNX.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(reading(path))?;
        let model = ModelProto::decode(&bytes[..]);
        let model = model.map_err(|error| malformed(path, error.to_string()))?;
        Ok(Self { path: path.into(), model })
    }

    fn graph(&self) -> std::result::Result<&GraphProto, Wrong> {
        self.model.graph.as_ref().ok_or_else(|| "no graph".into())
    }

    /// Compares what does not need to be computed: versions, inputs, outputs, metadata, and every tensor bit for bit.
    pub(crate) fn compare(&self, export: &Export) -> std::result::Result<(), Wrong> {
        let Self { model, .. } = self;
        let versions = (model.ir_version, model.opset_import.iter().map(|set| set.version).collect::<Vec<_>>());
        if versions != (Some(IR_VERSION), vec![Some(OPSET)]) {
            return Err(format!("the versions {versions:?}"));
        }
        if model.metadata_props != metadata(export) {
            return Err("other metadata".into());
        }
        let graph = self.graph()?;
        let (side, layers) = (export.model().image_size, export.description().layers);
        let width = export.model().channels(layers.stages - 1);
        let logits = (layers.classes > 0).then(|| value(LOGITS, &[layers.classes]));
        let outputs: Vec<ValueInfoProto> = logits.into_iter().chain([value(EMBEDDING, &[width])]).collect();
        if graph.input != [value(IMAGES, &[3, side, side])] || graph.output != outputs {
            return Err(format!("other inputs or outputs: {:?} to {:?}", graph.input, graph.output));
        }
        let mut found = graph.initializer.iter();
        for expected in initializers(export) {
            // Bits, as the tensors are bytes here.
            if found.next() != Some(&expected) {
                return Err(format!("another tensor in place of `{}`", expected.name.unwrap_or_default()));
            }
        }
        if found.next().is_some() { Err("more tensors".into()) } else { Ok(()) }
    }

    /// Computes the graph for `n` images of bytes, `[n, side, side, 3]`, normalised as the file's metadata say.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a graph that cannot be computed, or whose outputs are not as it declares them.
    pub(crate) fn run(&self, images: &[u8], n: usize, threads: usize) -> Result<Outputs> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool =
            pool.map_err(|error| Error::usage("run.threads", threads, format!("threads that start: {error}")))?;
        pool.install(|| self.outputs(images, n)).map_err(|wrong| malformed(&self.path, wrong))
    }

    fn outputs(&self, images: &[u8], n: usize) -> std::result::Result<Outputs, Wrong> {
        let side = ((images.len() / (3 * n)) as f64).sqrt() as usize;
        let pixels: Vec<f64> = normalised(images, self.three("mean")?, self.three("std")?).collect();
        // From pixels in rows to a plane for each colour.
        let plane = |i: usize| {
            let (image, colour, pixel) = (i / (3 * side * side), i / (side * side) % 3, i % (side * side));
            pixels[(image * side * side + pixel) * 3 + colour]
        };
        let data = (0..pixels.len()).map(plane).collect();
        let mut values = self.compute(Tensor { shape: vec![n, 3, side, side], data })?;
        let mut take = |name: &str| values.remove(name).map(|tensor| tensor.data);
        let embedding = take(EMBEDDING).ok_or("no output `embedding`")?;
        Ok(Outputs { embedding, logits: take(LOGITS).unwrap_or_default() })
    }

    /// Three numbers of the metadata.
    fn three(&self, key: &str) -> std::result::Result<[f64; 3], Wrong> {
        let entry = self.model.metadata_props.iter().find(|entry| entry.key.as_deref() == Some(key));
        let text = entry.and_then(|entry| entry.value.as_deref()).unwrap_or_default();
        serde_json::from_str(text).map_err(|_| format!("no three numbers in the metadata's `{key}`"))
    }

    /// All nodes in their order; gives the outputs.
    fn compute(&self, images: Tensor) -> std::result::Result<HashMap<String, Tensor>, Wrong> {
        let graph = self.graph()?;
        let mut values = HashMap::from([(IMAGES.to_string(), images)]);
        for initializer in &graph.initializer {
            let (name, tensor) = constant(initializer)?;
            values.insert(name, tensor);
        }
        let outputs: HashSet<&str> = graph.output.iter().filter_map(|output| output.name.as_deref()).collect();
        // A value is dropped behind the last node that takes it.
        let mut uses: HashMap<&str, usize> = HashMap::new();
        graph.node.iter().flat_map(|node| &node.input).for_each(|input| *uses.entry(input).or_default() += 1);
        for node in &graph.node {
            let [output] = &node.output[..] else { return Err(format!("{} outputs of a node", node.output.len())) };
            let inputs =
                node.input.iter().map(|name| values.get(name).ok_or(format!("`{name}` before it is computed")));
            let result = operator(node, &inputs.collect::<std::result::Result<Vec<_>, _>>()?)
                .map_err(|wrong| format!("{wrong} in the node of `{output}`"))?;
            for input in &node.input {
                let left = uses.get_mut(input.as_str()).map_or(0, |left| {
                    *left -= 1;
                    *left
                });
                if left == 0 && !outputs.contains(input.as_str()) {
                    values.remove(input);
                }
            }
            if values.insert(output.clone(), result).is_some() {
                return Err(format!("`{output}` twice"));
            }
        }
        for output in &graph.output {
            let name = output.name.as_deref().unwrap_or_default();
            let tensor = values.get(name).ok_or_else(|| format!("no output `{name}`"))?;
            check_shape(output, tensor)?;
        }
        values.retain(|name, _| outputs.contains(name.as_str()));
        Ok(values)
    }
}

fn malformed(path: &Path, found: String) -> Error {
    let advice = "the disk may be damaged: export it again, to another place";
    Error::malformed(path, "the ONNX file that was written", found, advice)
}

/// An initializer with its name.
fn constant(tensor: &TensorProto) -> std::result::Result<(String, Tensor), Wrong> {
    let name = tensor.name.clone().unwrap_or_default();
    let shape: Vec<usize> = tensor.dims.iter().map(|&side| usize::try_from(side).unwrap_or(0)).collect();
    let raw = tensor.raw_data.as_deref().unwrap_or_default();
    let data: Vec<f64> = raw
        .chunks_exact(4)
        .map(|bytes| f64::from(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])))
        .collect();
    if tensor.data_type != Some(F32) || raw.len() != 4 * shape.iter().product::<usize>() {
        return Err(format!("{} bytes for a tensor of {shape:?} in `{name}`", raw.len()));
    }
    Ok((name, Tensor { shape, data }))
}

/// That a tensor has the shape that an output declares.
fn check_shape(output: &ValueInfoProto, tensor: &Tensor) -> std::result::Result<(), Wrong> {
    let declared = output.r#type.as_ref().and_then(|kind| kind.tensor_type.as_ref()?.shape.as_ref());
    let sides = declared.map(|shape| shape.dim.iter().map(|side| side.value.as_ref()).collect::<Vec<_>>());
    let fits = |(declared, &side): (&Option<&Dimension>, &usize)| match declared {
        Some(Dimension::Fixed(fixed)) => *fixed == side as i64,
        Some(Dimension::Named(name)) => name == BATCH,
        None => false,
    };
    match sides {
        Some(sides) if sides.len() == tensor.shape.len() && sides.iter().zip(&tensor.shape).all(fits) => Ok(()),
        _ => Err(format!("an output of {:?} that is declared otherwise", tensor.shape)),
    }
}

/// A node's window: side, stride, pad of rows and columns alike.
fn window(node: &NodeProto) -> std::result::Result<[usize; 3], Wrong> {
    let of = |name: &str, count: usize| {
        let ints = node.attribute.iter().find(|a| a.name.as_deref() == Some(name) && a.r#type == Some(attribute::INTS));
        let ints = ints.map(|attribute| &attribute.ints[..]).unwrap_or_default();
        match ints.first().and_then(|&first| usize::try_from(first).ok()) {
            Some(first) if ints.len() == count && ints.iter().all(|&int| int == first as i64) => Ok(first),
            _ => Err(format!("{ints:?} for `{name}`")),
        }
    };
    let [side, stride, pad] = [of("kernel_shape", 2)?, of("strides", 2)?, of("pads", 4)?];
    if side == 0 || stride == 0 { Err("an empty window".into()) } else { Ok([side, stride, pad]) }
}

fn operator(node: &NodeProto, inputs: &[&Tensor]) -> std::result::Result<Tensor, Wrong> {
    match (node.op_type.as_deref().unwrap_or_default(), inputs) {
        ("Conv", [x, w]) => convolution(x, w, None, window(node)?),
        ("Conv", [x, w, bias]) => convolution(x, w, Some(bias), window(node)?),
        ("MaxPool", [x]) => max_pool(x, window(node)?),
        ("BatchNormalization", [x, rest @ ..]) => {
            let epsilon = node.attribute.iter().find(|a| a.name.as_deref() == Some("epsilon")).and_then(|a| a.f);
            normalise(x, rest, f64::from(epsilon.ok_or("no epsilon")?))
        }
        ("Relu", [x]) => Ok(Tensor { shape: x.shape.clone(), data: x.data.iter().map(|&x| x.max(0.0)).collect() }),
        ("Add", [a, b]) if a.shape == b.shape => {
            Ok(Tensor { shape: a.shape.clone(), data: a.data.iter().zip(&b.data).map(|(a, b)| a + b).collect() })
        }
        ("GlobalAveragePool", [x]) => {
            let [n, c, h, w] = four(x)?;
            let data = x.data.chunks_exact(h * w).map(|plane| plane.iter().sum::<f64>() / (h * w) as f64).collect();
            Ok(Tensor { shape: vec![n, c, 1, 1], data })
        }
        ("Flatten", [x])
            if !x.shape.is_empty()
                && node.attribute.iter().any(|a| a.name.as_deref() == Some("axis") && a.i == Some(1)) =>
        {
            let rest = x.shape[1..].iter().product();
            Ok(Tensor { shape: vec![x.shape[0], rest], data: x.data.clone() })
        }
        (op, inputs) => {
            let shapes: Vec<_> = inputs.iter().map(|input| &input.shape).collect();
            Err(format!("`{op}` of {shapes:?}"))
        }
    }
}

fn four(x: &Tensor) -> std::result::Result<[usize; 4], Wrong> {
    let sides: Option<[usize; 4]> = x.shape[..].try_into().ok();
    sides.filter(|sides| !sides.contains(&0)).ok_or_else(|| format!("{:?} where four sides belong", x.shape))
}

/// Sides of a window's output.
fn outputs(side: usize, [kernel, stride, pad]: [usize; 3]) -> std::result::Result<usize, Wrong> {
    let room = (side + 2 * pad).checked_sub(kernel).ok_or("a window larger than its input")?;
    Ok(room / stride + 1)
}

/// Of an output's column `q` and a window's column `s`, the column of the input; none in the padding.
fn column(q: usize, s: usize, stride: usize, pad: usize, w: usize) -> Option<usize> {
    (q * stride + s).checked_sub(pad).filter(|&column| column < w)
}

/// `y[n, k, p, q] = bias[k] + sum over c, r, s of x[n, c, p stride + r - pad, q stride + s - pad] w[k, c, r, s]`.
fn convolution(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&&Tensor>,
    window: [usize; 3],
) -> std::result::Result<Tensor, Wrong> {
    let ([n, c, h, w], [k, c_of_weight, r, s]) = (four(x)?, four(weight)?);
    let [kernel, stride, pad] = window;
    let is_bias_sound = bias.is_none_or(|bias| bias.shape == [k]);
    if c != c_of_weight || (r, s) != (kernel, kernel) || !is_bias_sound {
        return Err(format!("filters of {:?} on {:?}", weight.shape, x.shape));
    }
    let (p, q) = (outputs(h, window)?, outputs(w, window)?);
    // Which columns of an output a window's column reaches.
    let reach = |s: usize| {
        let inside = |&q: &usize| column(q, s, stride, pad, w).is_some();
        let first = (0..q).find(inside).unwrap_or(0);
        first..(first..q).take_while(inside).last().map_or(first, |last| last + 1)
    };
    let reach: Vec<_> = (0..s).map(reach).collect();
    let mut data = vec![0.0; n * k * p * q];
    data.par_chunks_exact_mut(p * q).enumerate().for_each(|(plane, y)| {
        let (image, filter) = (plane / k, plane % k);
        y.fill(bias.map_or(0.0, |bias| bias.data[filter]));
        for channel in 0..c {
            let x = &x.data[(image * c + channel) * h * w..][..h * w];
            let taps = &weight.data[(filter * c + channel) * r * s..][..r * s];
            for (row, y) in y.chunks_exact_mut(q).enumerate() {
                for dr in 0..r {
                    let Some(x) = column(row, dr, stride, pad, h).map(|row| &x[row * w..][..w]) else { continue };
                    for ds in 0..s {
                        let (tap, reach) = (taps[dr * s + ds], reach[ds].clone());
                        let Some(first) = column(reach.start, ds, stride, pad, w) else { continue };
                        let x = x[first..].iter().step_by(stride);
                        y[reach].iter_mut().zip(x).for_each(|(y, x)| *y += tap * x);
                    }
                }
            }
        }
    });
    Ok(Tensor { shape: vec![n, k, p, q], data })
}

/// The largest of each window; what lies outside is minus infinity.
fn max_pool(x: &Tensor, window: [usize; 3]) -> std::result::Result<Tensor, Wrong> {
    let [n, c, h, w] = four(x)?;
    let [kernel, stride, pad] = window;
    let (p, q) = (outputs(h, window)?, outputs(w, window)?);
    let mut data = Vec::with_capacity(n * c * p * q);
    for plane in x.data.chunks_exact(h * w) {
        for (row, col) in (0..p * q).map(|i| (i / q, i % q)) {
            let rows = (0..kernel).filter_map(|r| column(row, r, stride, pad, h));
            let all = rows.flat_map(|row| {
                (0..kernel).filter_map(move |s| column(col, s, stride, pad, w)).map(move |col| plane[row * w + col])
            });
            data.push(all.fold(f64::NEG_INFINITY, f64::max));
        }
    }
    Ok(Tensor { shape: vec![n, c, p, q], data })
}

/// `(x - mean) / sqrt(var + epsilon) * scale + bias`, each of a channel.
fn normalise(x: &Tensor, rest: &[&Tensor], epsilon: f64) -> std::result::Result<Tensor, Wrong> {
    let [_, c, h, w] = four(x)?;
    let [scale, bias, mean, variance] = rest else { return Err(format!("{} inputs", rest.len() + 1)) };
    if rest.iter().any(|tensor| tensor.shape != [c]) {
        return Err(format!("a tensor that is none of {c} channels"));
    }
    let mut data = x.data.clone();
    for (plane, values) in data.chunks_exact_mut(h * w).enumerate() {
        let channel = plane % c;
        let [scale, bias, mean, variance] = [scale, bias, mean, variance].map(|tensor| tensor.data[channel]);
        let deviation = (variance + epsilon).sqrt();
        values.iter_mut().for_each(|x| *x = (*x - mean) / deviation * scale + bias);
    }
    Ok(Tensor { shape: x.shape.clone(), data })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{int, window as window_of};

    fn tensor(shape: &[usize], data: &[f64]) -> Tensor {
        Tensor { shape: shape.to_vec(), data: data.to_vec() }
    }

    fn node(op: &str, attribute: Vec<super::super::AttributeProto>) -> NodeProto {
        NodeProto { op_type: Some(op.into()), attribute, ..NodeProto::default() }
    }

    #[test]
    fn a_convolution_by_hand() {
        // Two channels of 3 x 3; the second is counted ten times.
        let x: Vec<f64> = (1..=9).chain((1..=9).map(|x| 10 * x)).map(f64::from).collect();
        let x = tensor(&[1, 2, 3, 3], &x);
        let mut taps = vec![0.0; 18];
        // Of the first channel what is left of the pixel, of the second the pixel itself.
        (taps[3], taps[13]) = (1.0, 1.0);
        let (w, bias) = (tensor(&[1, 2, 3, 3], &taps), tensor(&[1], &[0.5]));
        let y = operator(&node("Conv", window_of(3, 1, 1)), &[&x, &w, &bias]).expect("fits");
        let expected = [10.0, 21.0, 32.0, 40.0, 54.0, 65.0, 70.0, 87.0, 98.0].map(|y| y + 0.5);
        assert_eq!(y, tensor(&[1, 1, 3, 3], &expected));
        // With a stride of 2 every other row and column.
        let y = operator(&node("Conv", window_of(3, 2, 1)), &[&x, &w]).expect("fits");
        assert_eq!(y, tensor(&[1, 1, 2, 2], &[10.0, 32.0, 70.0, 98.0]));
        assert!(operator(&node("Conv", window_of(3, 1, 1)), &[&x, &tensor(&[1, 1, 3, 3], &[0.0; 9])]).is_err());
        assert!(operator(&node("Conv", window_of(1, 1, 0)), &[&x, &w]).is_err());
    }

    #[test]
    fn the_other_operators_by_hand() {
        let x = tensor(&[1, 1, 3, 3], &[-1.0, -2.0, -3.0, 4.0, -5.0, 6.0, -7.0, 8.0, -9.0]);
        // Padding is no zero: -1 and -3 stand in windows at the upper edge without 4, 6 or 8 only where there are none.
        let y = operator(&node("MaxPool", window_of(3, 2, 1)), &[&x]).expect("fits");
        assert_eq!(y, tensor(&[1, 1, 2, 2], &[4.0, 6.0, 8.0, 8.0]));
        let low = tensor(&[1, 1, 1, 1], &[-2.0]);
        assert_eq!(operator(&node("MaxPool", window_of(3, 2, 1)), &[&low]).expect("fits"), low);
        let mean = operator(&node("GlobalAveragePool", Vec::new()), &[&x]).expect("fits");
        assert_eq!(mean, tensor(&[1, 1, 1, 1], &[-1.0]));
        let flat = operator(&node("Flatten", vec![int("axis", 1)]), &[&mean]).expect("fits");
        assert_eq!(flat.shape, [1, 1]);
        let epsilon =
            super::super::AttributeProto { f: Some(0.25), ..super::super::attribute("epsilon", attribute::FLOAT) };
        let [scale, bias, mean, variance] = [3.0, 1.0, -2.0, 2.0].map(|value| tensor(&[1], &[value]));
        // (-2 + 2) / 1.5 * 3 + 1.
        let y = operator(&node("BatchNormalization", vec![epsilon]), &[&low, &scale, &bias, &mean, &variance]);
        assert_eq!(y, Ok(tensor(&[1, 1, 1, 1], &[1.0])));
        assert!(operator(&node("Gemm", Vec::new()), &[&x]).is_err());
    }
}
