//! ResNet-50 v2 and its shorter forms: stem, stages of pre-activation bottlenecks, final normalisation, average.
//!
//! With four stages it is timm's `resnetv2_50`, with three the patch network. Every feature map is stored once and raw; what
//! a normalisation adds to it rides along in whoever loads it. Source: He et al. 2016 (arXiv 1603.05027).

use crate::layers::{BatchNorm, BatchNormActs, Conv, Dy, Emit, Tables, affine, before_and_own};
use crate::memory_plan::Ledger;
use crate::state::{Buffer, State};
use crate::{ModelConfig, Purpose};
use selfie_kernels::norm_relu_pool::{self, AvgDims};
use selfie_kernels::stem_pool::PoolDims;
use selfie_kernels::{Backend, ConvDims, Element, Memory, Result, grad_join};

/// Stem, stages, final normalisation and average: `[n, side, side, 3]` to `[n, width]`, or a vector for each cell.
#[derive(Debug)]
pub(crate) struct Resnet {
    stem: Stem,
    blocks: Vec<Block>,
    /// Of each stage, the blocks up to its end.
    ends: Vec<usize>,
    norm: BatchNorm,
    average: AvgDims,
}

/// A block for those who write the network down: its name and its convolutions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockConvs<'a> {
    pub(crate) name: &'a str,
    pub(crate) projection: Option<ConvDims>,
    pub(crate) convs: [ConvDims; 3],
}

/// What [`Resnet`] keeps for the backward pass, and the scratch its blocks share.
#[derive(Debug)]
pub(crate) struct ResnetActs<M: Memory, T: Element> {
    stem: StemActs<M, T>,
    /// Of each block; in evaluation two, used in turn.
    blocks: Vec<BlockActs<M, T>>,
    norm: BatchNormActs<M, T>,
    scratch: Scratch<M, T>,
}

/// Buffers of the largest feature map, free between two blocks.
#[derive(Debug)]
struct Scratch<M: Memory, T: Element> {
    /// Forward, the first: room for the stem's map before pooling, a projection's output. Backward, at even blocks: what the
    /// projection sends back, then the gradient at the block's input; and the gradient at its output. The other way round
    /// at odd blocks, so that one's input is where another's output was.
    maps: [Buffer<M, T>; 2],
    /// Gradient behind the third, then behind the first normalisation.
    dz: Buffer<M, T>,
    /// Gradient behind the second normalisation.
    dz2: Buffer<M, T>,
}

impl Resnet {
    /// The layers of `stages` stages for `n` images of `side` pixels a side.
    pub(crate) fn new(tables: &mut Tables, config: &ModelConfig, stages: usize, n: usize, side: usize) -> Self {
        let stem = Stem::new(tables, config, n, side);
        let (mut side, mut channels) = (stem.side_out(), config.stem_width);
        let (mut blocks, mut ends) = (Vec::new(), Vec::new());
        for (stage, &depth) in config.depths[..stages].iter().enumerate() {
            for i in 0..depth {
                let first = i == 0;
                let input = BlockInput { i: blocks.len(), n, side, channels };
                let shape = BlockShape {
                    out: config.channels(stage),
                    stride: if first && stage > 0 { 2 } else { 1 },
                    shortcut: if first { Shortcut::Projection } else { Shortcut::Identity },
                };
                let block = Block::new(tables, &format!("stages.{stage}.blocks.{i}"), input, shape, config.bn_eps);
                (side, channels) = (block.conv2.dims.p(), shape.out);
                blocks.push(block);
            }
            ends.push(blocks.len());
        }
        let norm = BatchNorm::new(tables, "norm", n * side * side, channels, config.bn_eps);
        let average = AvgDims { n, h: side, w: side, c: channels, window_h: side, window_w: side };
        Self { stem, blocks, ends, norm, average }
    }

    /// The same with an average over each of `cells * cells` cells of the last map, where these divide it.
    pub(crate) fn with_cells(self, cells: usize) -> Option<Self> {
        let side = self.average.h;
        let window = (cells > 0 && side.is_multiple_of(cells)).then(|| side / cells)?;
        Some(Self { average: AvgDims { window_h: window, window_w: window, ..self.average }, ..self })
    }

    /// Side of the last map.
    pub(crate) fn side(&self) -> usize {
        self.average.h
    }

    /// Elements of the pooled features: `[n, cells, width]`, mostly with one cell.
    pub(crate) fn len_out(&self) -> usize {
        self.average.len_out()
    }

    /// Width of the pooled features.
    pub(crate) fn width(&self) -> usize {
        self.average.c
    }

    /// Width of those behind the first `stages` stages.
    pub(crate) fn width_behind(&self, stages: usize) -> usize {
        self.blocks[self.ends[stages - 1] - 1].conv3.dims.k
    }

    /// The first convolution, and whether a max pooling follows it.
    pub(crate) fn stem(&self) -> (ConvDims, bool) {
        (self.stem.conv.dims, self.stem.pool.is_some())
    }

    /// The blocks in their order.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = BlockConvs<'_>> {
        self.blocks.iter().map(|block| BlockConvs {
            name: &block.name,
            projection: block.projection.as_ref().map(|conv| conv.dims),
            convs: [&block.conv1, &block.conv2, &block.conv3].map(|conv| conv.dims),
        })
    }

    /// Pixels of the last map, of all images.
    pub(crate) fn rows(&self) -> usize {
        self.average.rows_in()
    }

    /// Elements of the largest partial sums.
    pub(crate) fn partial_len(&self) -> usize {
        let blocks = self.blocks.iter().flat_map(|block| [&block.norm1, &block.norm2, &block.norm3]);
        blocks.chain([&self.norm]).map(BatchNorm::partial_len).max().unwrap_or(0)
    }

    /// The buffers of all this.
    pub(crate) fn acts<M: Memory, T: Element>(
        &self,
        ledger: &mut Ledger<M>,
        purpose: Purpose,
    ) -> Result<ResnetActs<M, T>> {
        ledger.scope("stem");
        let stem = self.stem.acts(ledger)?;
        let largest = |len: fn(&Block) -> usize| self.blocks.iter().map(len).max().unwrap_or(0);
        let mut blocks = Vec::new();
        match purpose {
            Purpose::Train | Purpose::Accumulate => {
                for block in &self.blocks {
                    ledger.scope(&block.name);
                    blocks.push(BlockActs::new(ledger, block.lens(), purpose)?);
                }
            }
            Purpose::Evaluate => {
                for i in 0..self.blocks.len().min(2) {
                    ledger.scope(format!("stages.shared{i}"));
                    let lens = BlockLens {
                        c1: largest(|b| b.lens().c1),
                        c2: largest(|b| b.lens().c2),
                        y1: largest(|b| b.lens().y1),
                        y2: largest(|b| b.lens().y2),
                        sum: largest(|b| b.lens().sum),
                    };
                    blocks.push(BlockActs::new(ledger, lens, purpose)?);
                }
            }
        }
        ledger.scope("norm");
        let norm = BatchNormActs::new(ledger, "norm", self.norm.channels(), purpose)?;
        ledger.scope("scratch");
        let projected = |block: &Block| block.projection.as_ref().map_or(0, |conv| conv.dims.len_out());
        let map = largest(|block| block.conv1.dims.len_in().max(block.lens().sum));
        let forward = largest(projected).max(self.stem.len_map());
        let scratch = Scratch {
            maps: [
                ledger.alloc("map0", forward.max(purpose.trained(map)))?,
                ledger.alloc("map1", purpose.trained(forward.max(map)))?,
            ],
            dz: ledger.alloc("dz", purpose.trained(map))?,
            dz2: ledger.alloc("dz2", purpose.trained(largest(|block| block.lens().y1)))?,
        };
        Ok(ResnetActs { stem, blocks, norm, scratch })
    }

    /// `h = average(relu(norm(stages(stem(pixels)))))`.
    pub(crate) fn forward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        pixels: &Buffer<B, T>,
        acts: &mut ResnetActs<B, T>,
        h: &mut Buffer<B, T>,
    ) -> Result<()> {
        self.forward_average(self.ends.len(), self.average, state, pixels, acts, h)
    }

    /// The same with the first `stages` stages alone, averaged over the whole map: the norm is the one that takes their
    /// output, the next block's first or the last.
    pub(crate) fn forward_behind<B: Backend<T>, T: Element>(
        &self,
        stages: usize,
        state: &mut State<B, T>,
        pixels: &Buffer<B, T>,
        acts: &mut ResnetActs<B, T>,
        h: &mut Buffer<B, T>,
    ) -> Result<()> {
        let last = self.blocks[self.ends[stages - 1] - 1].conv3.dims;
        let (side_h, side_w) = (last.p(), last.q());
        let average = AvgDims { n: last.n, h: side_h, w: side_w, c: last.k, window_h: side_h, window_w: side_w };
        self.forward_average(stages, average, state, pixels, acts, h)
    }

    fn forward_average<B: Backend<T>, T: Element>(
        &self,
        stages: usize,
        average: AvgDims,
        state: &mut State<B, T>,
        pixels: &Buffer<B, T>,
        acts: &mut ResnetActs<B, T>,
        h: &mut Buffer<B, T>,
    ) -> Result<()> {
        let ResnetActs { stem, blocks, norm, scratch } = acts;
        let map = &mut scratch.maps[0];
        self.stem.forward(state, pixels, stem, map)?;
        let end = self.ends[stages - 1];
        for (i, block) in self.blocks[..end].iter().enumerate() {
            let (before, acts) = before_and_own(blocks, i);
            let x = before.map_or(&stem.y, |before| &before.sum);
            block.forward(state, x, acts, map)?;
        }
        let x = output(blocks, end);
        self.blocks.get(end).map_or(&self.norm, |next| &next.norm1).forward(state, norm)?;
        state.device.norm_relu_pool_forward(norm_relu_pool::Forward {
            dims: average,
            x: B::view(x, 0..average.rows_in() * average.c),
            norm: norm.view(average.c),
            y: B::view_mut(h, 0..average.len_out()),
        })
    }

    /// All parameters' gradients from `dh`.
    pub(crate) fn backward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        pixels: &Buffer<B, T>,
        acts: &mut ResnetActs<B, T>,
        dh: &Buffer<B, T>,
    ) -> Result<()> {
        let ResnetActs { stem, blocks, norm, scratch } = acts;
        let (rows, c) = (self.average.rows_in(), self.average.c);
        let x = output(blocks, self.blocks.len());
        state.device.norm_relu_pool_backward(norm_relu_pool::Backward {
            dims: self.average,
            dy: B::view(dh, 0..self.average.len_out()),
            x: B::view(x, 0..rows * c),
            norm: norm.view(c),
            dz: B::view_mut(&mut scratch.dz, 0..rows * c),
            sums: &mut state.partial,
        })?;
        self.norm.backward(state, norm)?;
        state.device.grad_join(grad_join::Join {
            rows,
            c,
            affine: affine(&scratch.dz, x, norm, rows, c),
            skip: None,
            dx: B::view_mut(&mut scratch.maps[self.blocks.len() % 2], 0..rows * c),
        })?;
        for (i, block) in self.blocks.iter().enumerate().rev() {
            let (before, acts) = before_and_own(blocks, i);
            let x = before.map_or(&stem.y, |before| &before.sum);
            block.backward(state, x, acts, scratch)?;
            if i > 0 {
                block.join(state, x, acts, scratch)?;
            }
        }
        // The first block's input has one more consumer, its normalisation, which the stem applies itself.
        let dy = Dy::Behind { dz: &scratch.dz, x: &stem.y, norm: &blocks[0].norm1 };
        self.stem.backward(state, pixels, &stem.argmax, dy, &mut scratch.maps[0])
    }
}

/// For block `i`: the map that is free, and the gradient at its output.
fn sides<A>([even, odd]: &mut [A; 2], i: usize) -> (&mut A, &mut A) {
    if i.is_multiple_of(2) { (even, odd) } else { (odd, even) }
}

/// The last of `count` blocks' output.
fn output<M: Memory, T: Element>(blocks: &[BlockActs<M, T>], count: usize) -> &Buffer<M, T> {
    &blocks[(count - 1) % blocks.len()].sum
}

/// The first convolution, and the pooling that follows the large one.
#[derive(Debug)]
struct Stem {
    conv: Conv,
    pool: Option<PoolDims>,
}

#[derive(Debug)]
struct StemActs<M: Memory, T: Element> {
    /// The first block's input.
    y: Buffer<M, T>,
    /// Which pixel of its window the pooling took.
    argmax: Buffer<M, u8>,
}

impl Stem {
    fn new(tables: &mut Tables, config: &ModelConfig, n: usize, side: usize) -> Self {
        let (r, stride, pad) = if config.has_large_stem() { (7, 2, 3) } else { (3, 1, 1) };
        let dims = ConvDims { n, h: side, w: side, c: 3, k: config.stem_width, r, s: r, stride, pad };
        let conv = Conv::new(tables, "stem.conv", dims);
        let pool = config.has_large_stem().then(|| PoolDims::behind(&dims));
        Self { conv, pool }
    }

    fn side_out(&self) -> usize {
        self.pool.map_or(self.conv.dims.p(), |pool| pool.p())
    }

    /// Elements of the map before pooling, for which devices that do not pool at once need room.
    fn len_map(&self) -> usize {
        self.pool.map_or(0, |_| self.conv.dims.len_out())
    }

    fn acts<M: Memory, T: Element>(&self, ledger: &mut Ledger<M>) -> Result<StemActs<M, T>> {
        let pooled = self.pool.map_or(0, |pool| pool.len_out());
        let len = if pooled > 0 { pooled } else { self.conv.dims.len_out() };
        Ok(StemActs { y: ledger.alloc("y", len)?, argmax: ledger.alloc("argmax", pooled)? })
    }

    fn forward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        pixels: &Buffer<B, T>,
        acts: &mut StemActs<B, T>,
        map: &mut Buffer<B, T>,
    ) -> Result<()> {
        match self.pool {
            Some(_) => self.conv.stem_pool_forward(state, pixels, map, (&mut acts.y, &mut acts.argmax)),
            None => self.conv.stem_forward(state, pixels, &mut acts.y),
        }
    }

    fn backward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        pixels: &Buffer<B, T>,
        argmax: &Buffer<B, u8>,
        dy: Dy<'_, B, T>,
        map: &mut Buffer<B, T>,
    ) -> Result<()> {
        match self.pool {
            Some(_) => self.conv.stem_pool_backward_filter(state, pixels, (dy, argmax), map),
            None => self.conv.stem_backward_filter(state, pixels, dy),
        }
    }
}

/// A pre-activation bottleneck: `p = relu(norm1(x))`, `y1 = conv1(p)`, `y2 = conv2(relu(norm2(y1)))`,
/// `sum = conv3(relu(norm3(y2))) + shortcut`; the shortcut is x, or the projection of p.
#[derive(Debug)]
struct Block {
    /// Its number in the network.
    i: usize,
    name: String,
    projection: Option<Conv>,
    norm1: BatchNorm,
    conv1: Conv,
    norm2: BatchNorm,
    conv2: Conv,
    norm3: BatchNorm,
    conv3: Conv,
}

/// Sizes of a block's input, `[n, side, side, channels]`.
#[derive(Debug, Clone, Copy)]
struct BlockInput {
    /// The block's number in the network.
    i: usize,
    n: usize,
    side: usize,
    channels: usize,
}

/// What a block makes of its input.
#[derive(Debug, Clone, Copy)]
struct BlockShape {
    out: usize,
    stride: usize,
    shortcut: Shortcut,
}

/// How a block's input reaches its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shortcut {
    Identity,
    Projection,
}

/// Elements of a block's buffers.
#[derive(Debug, Clone, Copy)]
struct BlockLens {
    /// Channels of the first normalisation.
    c1: usize,
    /// Channels of the second and third.
    c2: usize,
    y1: usize,
    y2: usize,
    sum: usize,
}

#[derive(Debug)]
struct BlockActs<M: Memory, T: Element> {
    norm1: BatchNormActs<M, T>,
    y1: Buffer<M, T>,
    norm2: BatchNormActs<M, T>,
    y2: Buffer<M, T>,
    norm3: BatchNormActs<M, T>,
    sum: Buffer<M, T>,
}

impl<M: Memory, T: Element> BlockActs<M, T> {
    fn new(ledger: &mut Ledger<M>, lens: BlockLens, purpose: Purpose) -> Result<Self> {
        Ok(Self {
            norm1: BatchNormActs::new(ledger, "norm1", lens.c1, purpose)?,
            y1: ledger.alloc("y1", lens.y1)?,
            norm2: BatchNormActs::new(ledger, "norm2", lens.c2, purpose)?,
            y2: ledger.alloc("y2", lens.y2)?,
            norm3: BatchNormActs::new(ledger, "norm3", lens.c2, purpose)?,
            sum: ledger.alloc("sum", lens.sum)?,
        })
    }
}

impl Block {
    fn new(tables: &mut Tables, name: &str, input: BlockInput, shape: BlockShape, eps: f64) -> Self {
        let BlockInput { i, n, side, channels } = input;
        let (out, mid, stride) = (shape.out, shape.out / 4, shape.stride);
        let pixels = ConvDims { n, h: side, w: side, c: channels, k: mid, r: 1, s: 1, stride: 1, pad: 0 };
        let spatial = ConvDims { c: mid, k: mid, r: 3, s: 3, stride, pad: 1, ..pixels };
        let (p, q) = (spatial.p(), spatial.q());
        let expand = ConvDims { h: p, w: q, c: mid, k: out, ..pixels };
        Self {
            i,
            name: name.into(),
            projection: (shape.shortcut == Shortcut::Projection)
                .then(|| Conv::new(tables, &format!("{name}.downsample.conv"), ConvDims { k: out, stride, ..pixels })),
            norm1: BatchNorm::new(tables, &format!("{name}.norm1"), n * side * side, channels, eps),
            conv1: Conv::new(tables, &format!("{name}.conv1"), pixels),
            norm2: BatchNorm::new(tables, &format!("{name}.norm2"), n * side * side, mid, eps),
            conv2: Conv::new(tables, &format!("{name}.conv2"), spatial),
            norm3: BatchNorm::new(tables, &format!("{name}.norm3"), n * p * q, mid, eps),
            conv3: Conv::new(tables, &format!("{name}.conv3"), expand),
        }
    }

    fn lens(&self) -> BlockLens {
        BlockLens {
            c1: self.norm1.channels(),
            c2: self.norm2.channels(),
            y1: self.conv1.dims.len_out(),
            y2: self.conv2.dims.len_out(),
            sum: self.conv3.dims.len_out(),
        }
    }

    /// Takes the statistics of `x` from the partial sums and leaves those of its output there.
    fn forward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        x: &Buffer<B, T>,
        acts: &mut BlockActs<B, T>,
        map: &mut Buffer<B, T>,
    ) -> Result<()> {
        let BlockActs { norm1, y1, norm2, y2, norm3, sum } = acts;
        self.norm1.forward(state, norm1)?;
        let shortcut = match &self.projection {
            Some(projection) => {
                projection.forward(state, (x, norm1), None, map, Emit::Nothing)?;
                map
            }
            None => x,
        };
        self.conv1.forward(state, (x, norm1), None, y1, Emit::Statistics)?;
        self.norm2.forward(state, norm2)?;
        self.conv2.forward(state, (y1, norm2), None, y2, Emit::Statistics)?;
        self.norm3.forward(state, norm3)?;
        self.conv3.forward(state, (y2, norm3), Some(shortcut), sum, Emit::Statistics)
    }

    /// From the gradient at the output, in `scratch`: the parameters' gradients, and `scratch.dz`, the gradient behind `norm1`.
    fn backward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        x: &Buffer<B, T>,
        acts: &mut BlockActs<B, T>,
        scratch: &mut Scratch<B, T>,
    ) -> Result<()> {
        let BlockActs { norm1, y1, norm2, y2, norm3, .. } = acts;
        let ((map, dy), dz, dz2) = (sides(&mut scratch.maps, self.i), &mut scratch.dz, &mut scratch.dz2);

        let dsum = Dy::Plain(dy);
        self.conv3.backward(state, (y2, norm3), dsum, None, dz)?;
        self.norm3.backward(state, norm3)?;

        let dy2 = Dy::Behind { dz, x: y2, norm: norm3 };
        self.conv2.backward(state, (y1, norm2), dy2, None, dz2)?;
        self.norm2.backward(state, norm2)?;

        let addend = match &self.projection {
            Some(projection) => {
                projection.backward_filter(state, (x, norm1), dsum)?;
                projection.projection_backward_data(state, dsum, map)?;
                Some((projection, &*map))
            }
            None => None,
        };
        let dy1 = Dy::Behind { dz: dz2, x: y1, norm: norm2 };
        self.conv1.backward(state, (x, norm1), dy1, addend, dz)?;
        self.norm1.backward(state, norm1)
    }

    /// The gradient at the block's input, into `scratch`: behind `norm1`, and round the block where the shortcut is x.
    fn join<B: Backend<T>, T: Element>(
        &self,
        state: &State<B, T>,
        x: &Buffer<B, T>,
        acts: &BlockActs<B, T>,
        scratch: &mut Scratch<B, T>,
    ) -> Result<()> {
        let ((map, dy), dz) = (sides(&mut scratch.maps, self.i), &scratch.dz);
        let (rows, c) = (self.conv1.dims.rows_in(), self.conv1.dims.c);
        state.device.grad_join(grad_join::Join {
            rows,
            c,
            affine: affine(dz, x, &acts.norm1, rows, c),
            skip: self.projection.is_none().then(|| B::view(dy, 0..rows * c)),
            dx: B::view_mut(map, 0..rows * c),
        })
    }
}
