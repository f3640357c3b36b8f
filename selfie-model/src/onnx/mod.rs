//! A network's evaluation as an ONNX file, opset 17: <https://onnx.ai/onnx/operators/>.
//!
//! In: `images`, `[batch, 3, side, side]`, normalised. Out: `embedding`, `[batch, width]`, and of a classifier `logits`,
//! `[batch, classes]`. Normalisations are operators with their running statistics, as the network evaluates them, and
//! tensors have timm's names and shapes, so that they are found again. How pixels are normalised, sizes and the classes are
//! in the file's metadata.

mod graph;
mod messages;

pub(crate) use graph::OnnxFile;

use crate::encoder::backbone_and_classifier;
use crate::error::{Error, Result};
use crate::export::Export;
use crate::layers::Tables;
use messages::{
    AttributeProto, Dimension, DimensionProto, F32, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto, attribute,
};
use prost::Message;
use selfie_kernels::ConvDims;
use serde_json::json;

/// Of the operators: those of this version are read by runtimes since 2022.
const OPSET: i64 = 17;
/// Of the representation: the one that came with the opset.
const IR_VERSION: i64 = 8;
/// A file of protocol buffers can be no longer.
const MAX_BYTES: usize = i32::MAX as usize;

const IMAGES: &str = "images";
const EMBEDDING: &str = "embedding";
const LOGITS: &str = "logits";
const BATCH: &str = "batch";

/// The bytes of the file.
///
/// # Errors
/// Usage: more than 2 GiB of weights.
pub(crate) fn write(export: &Export) -> Result<Vec<u8>> {
    let model = model(export);
    let bytes = model.encoded_len();
    if bytes > MAX_BYTES {
        return Err(Error::usage(
            "to",
            "onnx",
            format!("a network of up to 2 GiB, not of {bytes} bytes; export it to timm"),
        ));
    }
    Ok(model.encode_to_vec())
}

fn model(export: &Export) -> ModelProto {
    let description = export.description();
    ModelProto {
        ir_version: Some(IR_VERSION),
        producer_name: Some("selfie".into()),
        producer_version: Some(env!("CARGO_PKG_VERSION").into()),
        doc_string: Some(format!("ResNet v2. Input: {}.", description.input())),
        graph: Some(graph(export)),
        opset_import: vec![OperatorSetIdProto { domain: Some(String::new()), version: Some(OPSET) }],
        metadata_props: metadata(export),
    }
}

/// What is known of images and classes, each as JSON. Keys are those of timm's `config.json`.
fn metadata(export: &Export) -> Vec<StringStringEntryProto> {
    let description = export.description();
    let model = export.model();
    let entry = |(key, value): (&str, serde_json::Value)| {
        let text = value.as_str().map_or_else(|| value.to_string(), String::from);
        StringStringEntryProto { key: Some(key.into()), value: Some(text) }
    };
    let entries = [
        ("input_size", json!([3, model.image_size, model.image_size])),
        ("mean", json!(model.mean)),
        ("std", json!(model.std)),
        ("interpolation", json!(description.resize.interpolation)),
        ("crop_pct", json!(description.resize.crop)),
        ("channels", json!("RGB")),
        ("preprocessing", json!("(pixel / 255 - mean) / std, in the order batch, channel, row, column")),
        ("embedding", json!(description.layers.last().to_string())),
    ];
    let labels = (!description.classes.is_empty()).then(|| ("label_names", json!(description.classes)));
    entries.into_iter().chain(labels).map(entry).collect()
}

fn graph(export: &Export) -> GraphProto {
    let (model, layers) = (export.model(), export.description().layers);
    let (backbone, head) = backbone_and_classifier(&mut Tables::default(), model, layers, 1);
    let mut graph = Graph { nodes: Vec::new(), eps: model.bn_eps as f32 };

    let (stem, has_pool) = backbone.stem();
    let mut x = graph.conv("stem.conv", IMAGES, stem);
    if has_pool {
        x = graph.node("MaxPool", "stem.pool", &[&x], window(3, 2, 1));
    }
    for block in backbone.blocks() {
        let name = |part: &str| format!("{}.{part}", block.name);
        let [conv1, conv2, conv3] = block.convs;
        let p = graph.norm_relu(&name("norm1"), &x);
        let shortcut = block.projection.map(|dims| graph.conv(&name("downsample.conv"), &p, dims));
        let y = graph.conv(&name("conv1"), &p, conv1);
        let y = graph.norm_relu(&name("norm2"), &y);
        let y = graph.conv(&name("conv2"), &y, conv2);
        let y = graph.norm_relu(&name("norm3"), &y);
        let y = graph.conv(&name("conv3"), &y, conv3);
        x = graph.node("Add", &name("sum"), &[&y, shortcut.as_ref().unwrap_or(&x)], Vec::new());
    }
    x = graph.norm_relu("norm", &x);
    x = graph.node("GlobalAveragePool", "head.global_pool", &[&x], Vec::new());
    graph.named("Flatten", EMBEDDING, &[&x], vec![int("axis", 1)]);
    let mut output = vec![value(EMBEDDING, &[backbone.width()])];
    if head.is_some() {
        let parameters = ["head.fc.weight", "head.fc.bias"];
        let scores = graph.node("Conv", "head.fc", &[&x, parameters[0], parameters[1]], window(1, 1, 0));
        graph.named("Flatten", LOGITS, &[&scores], vec![int("axis", 1)]);
        output.insert(0, value(LOGITS, &[layers.classes]));
    }
    let side = model.image_size;
    GraphProto {
        node: graph.nodes,
        name: Some("selfie".into()),
        initializer: initializers(export).collect(),
        input: vec![value(IMAGES, &[3, side, side])],
        output,
    }
}

/// The tensors, in the order of the network.
fn initializers(export: &Export) -> impl Iterator<Item = TensorProto> {
    let entries = export.flats().into_iter().flat_map(|(table, flat)| table.entries().iter().map(move |e| (e, flat)));
    entries.map(|(entry, flat)| {
        let values = entry.to_file(&flat[entry.range.clone()]);
        TensorProto {
            dims: entry.shape.iter().map(|&side| side as i64).collect(),
            data_type: Some(F32),
            name: Some(entry.name.clone()),
            raw_data: Some(values.into_iter().flat_map(f32::to_le_bytes).collect()),
        }
    })
}

/// The nodes so far.
struct Graph {
    nodes: Vec<NodeProto>,
    eps: f32,
}

impl Graph {
    /// Appends a node with one output, which is called `name`.
    fn named(&mut self, op: &str, name: &str, inputs: &[&str], attribute: Vec<AttributeProto>) {
        self.nodes.push(NodeProto {
            input: inputs.iter().map(|&input| input.into()).collect(),
            output: vec![name.into()],
            name: Some(format!("{name}.node")),
            op_type: Some(op.into()),
            attribute,
        });
    }

    /// The same, and gives that name.
    fn node(&mut self, op: &str, name: &str, inputs: &[&str], attribute: Vec<AttributeProto>) -> String {
        self.named(op, name, inputs, attribute);
        name.into()
    }

    fn conv(&mut self, name: &str, x: &str, dims: ConvDims) -> String {
        self.node("Conv", name, &[x, &format!("{name}.weight")], window(dims.r, dims.stride, dims.pad))
    }

    fn norm_relu(&mut self, name: &str, x: &str) -> String {
        let tensor = |part: &str| format!("{name}.{part}");
        let parameters = ["weight", "bias", "running_mean", "running_var"].map(tensor);
        let [weight, bias, mean, variance] = &parameters;
        let epsilon = AttributeProto { f: Some(self.eps), ..attribute("epsilon", attribute::FLOAT) };
        let normalised = self.node("BatchNormalization", name, &[x, weight, bias, mean, variance], vec![epsilon]);
        self.node("Relu", &tensor("relu"), &[&normalised], Vec::new())
    }
}

/// Attributes of a square window.
fn window(side: usize, stride: usize, pad: usize) -> Vec<AttributeProto> {
    let ints = |name: &str, values: &[usize]| AttributeProto {
        ints: values.iter().map(|&value| value as i64).collect(),
        ..attribute(name, attribute::INTS)
    };
    vec![ints("kernel_shape", &[side; 2]), ints("strides", &[stride; 2]), ints("pads", &[pad; 4])]
}

fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { i: Some(value), ..attribute(name, attribute::INT) }
}

fn attribute(name: &str, kind: i32) -> AttributeProto {
    AttributeProto { name: Some(name.into()), r#type: Some(kind), ..AttributeProto::default() }
}

/// An input or output: any number of images, and the sides of one.
fn value(name: &str, sides: &[usize]) -> ValueInfoProto {
    let dimension = |value| DimensionProto { value: Some(value) };
    let batch = dimension(Dimension::Named(BATCH.into()));
    let sides = sides.iter().map(|&side| dimension(Dimension::Fixed(side as i64)));
    let shape = TensorShapeProto { dim: std::iter::once(batch).chain(sides).collect() };
    let tensor = TensorTypeProto { elem_type: Some(F32), shape: Some(shape) };
    ValueInfoProto { name: Some(name.into()), r#type: Some(TypeProto { tensor_type: Some(tensor) }), doc_string: None }
}
