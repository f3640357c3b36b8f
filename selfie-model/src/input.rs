//! The way in: a batch from the host to the network's input on the device.

use crate::memory_plan::Ledger;
use crate::state::Buffer;
use crate::{Inputs, ModelConfig};
use selfie_kernels::augment::{self, AugmentDims};
use selfie_kernels::{Backend, Element, Error, Memory, Result};

/// A batch on the device, and room for the next one.
#[derive(Debug)]
pub(crate) struct Input<M: Memory, T: Element> {
    dims: AugmentDims,
    mean: [f64; 3],
    std: [f64; 3],
    /// Where the next batch waits while the device is at work on this one.
    staged: Batch<M>,
    /// What is known of the next batch on the host.
    next: Option<About>,
    batch: Batch<M>,
    /// `[n * grid * grid, patch, patch, 3]`, normalised.
    pub(crate) pixels: Buffer<M, T>,
    /// Of the present batch.
    pub(crate) about: About,
}

/// A batch as it comes from the host.
#[derive(Debug)]
struct Batch<M: Memory> {
    images: Buffer<M, u8>,
    draws: Buffer<M, i32>,
    /// `[n, targets]`: see [`Inputs::targets`].
    targets: Buffer<M, u32>,
}

/// What the host knows of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct About {
    /// Keys the dropout.
    pub(crate) first_sample: u64,
    /// Images that count.
    pub(crate) valid: usize,
    pub(crate) source: Source,
}

/// What a batch is given as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// Bytes, still to be cropped, flipped, normalised and cut.
    Images,
    /// The network's input itself.
    Pixels,
}

impl<M: Memory> Batch<M> {
    fn new(ledger: &mut Ledger<M>, name: &str, lens: [usize; 3]) -> Result<Self> {
        let [images, draws, targets] = lens;
        Ok(Self {
            images: ledger.alloc(&format!("{name}images"), images)?,
            draws: ledger.alloc(&format!("{name}draws"), draws)?,
            targets: ledger.alloc(&format!("{name}targets"), targets)?,
        })
    }
}

impl<M: Memory, T: Element> Input<M, T> {
    /// For images cut into `grid * grid` patches, with `targets` numbers beside each image.
    pub(crate) fn new(
        ledger: &mut Ledger<M>,
        config: &ModelConfig,
        batch: usize,
        grid: usize,
        targets: usize,
    ) -> Result<Self> {
        let side = config.image_size;
        let dims = AugmentDims { n: batch, h: side, w: side, grid, patch: side / grid };
        let lens = [batch * side * side * 3, batch * 3, batch * targets];
        ledger.scope("input");
        Ok(Self {
            dims,
            mean: config.mean,
            std: config.std,
            staged: Batch::new(ledger, "staged.", lens)?,
            next: None,
            batch: Batch::new(ledger, "", lens)?,
            pixels: ledger.alloc("pixels", dims.len_out())?,
            about: About { first_sample: 0, valid: batch, source: Source::Pixels },
        })
    }

    /// Images of a batch.
    pub(crate) fn batch(&self) -> usize {
        self.dims.n
    }

    /// Height and width of an image.
    pub(crate) fn image(&self) -> [usize; 2] {
        [self.dims.h, self.dims.w]
    }

    /// Numbers beside an image.
    pub(crate) fn targets_per_image(&self) -> usize {
        M::len(&self.batch.targets) / self.dims.n
    }

    /// `[n, targets]` of the present batch: see [`Inputs::targets`].
    pub(crate) fn targets(&self) -> &Buffer<M, u32> {
        &self.batch.targets
    }

    /// Brings the next batch to the device, beside what that is at work on. The caller has checked what the targets mean.
    pub(crate) fn stage(&mut self, device: &M, inputs: &Inputs<'_>) -> Result<()> {
        let Inputs { images, draws, targets, first_sample, valid } = *inputs;
        expect_len("images", images.len(), M::len(&self.staged.images))?;
        expect_len("draws", draws.len(), M::len(&self.staged.draws))?;
        self.check_len(targets)?;
        if !(1..=self.dims.n).contains(&valid) {
            let reason = format!("{valid} of {} images valid", self.dims.n);
            return Err(Error::Dims { op: "load", reason });
        }
        self.next = None;
        device.stage(images, M::all_mut(&mut self.staged.images))?;
        device.stage(draws, M::all_mut(&mut self.staged.draws))?;
        device.stage(targets, M::all_mut(&mut self.staged.targets))?;
        self.next = Some(About { first_sample, valid, source: Source::Images });
        Ok(())
    }

    /// Takes `[n, h, w, 3]` as it is, cut into patches, as the next batch. It overwrites the present one.
    pub(crate) fn put_pixels(&mut self, device: &M, pixels: &[T], targets: &[u32], first_sample: u64) -> Result<()> {
        let AugmentDims { n, h, w, grid, patch } = self.dims;
        expect_len("pixels", pixels.len(), n * h * w * 3)?;
        self.check_len(targets)?;
        let mut cut = Vec::with_capacity(pixels.len());
        for image in pixels.chunks_exact(h * w * 3) {
            for (row, column) in (0..grid * grid).map(|i| (i / grid, i % grid)) {
                for y in row * patch..(row + 1) * patch {
                    let start = (y * w + column * patch) * 3;
                    cut.extend_from_slice(&image[start..start + patch * 3]);
                }
            }
        }
        device.upload(targets, M::all_mut(&mut self.batch.targets))?;
        device.upload(&cut, M::all_mut(&mut self.pixels))?;
        self.next = Some(About { first_sample, valid: n, source: Source::Pixels });
        Ok(())
    }

    /// Makes the next batch the present one.
    pub(crate) fn advance(&mut self, device: &M) -> Result<()> {
        let nothing = || Error::Dims { op: "begin", reason: "no batch was staged since the last one".into() };
        self.about = self.next.take().ok_or_else(nothing)?;
        if self.about.source == Source::Images {
            device.copy(M::all(&self.staged.images), M::all_mut(&mut self.batch.images))?;
            device.copy(M::all(&self.staged.draws), M::all_mut(&mut self.batch.draws))?;
            device.copy(M::all(&self.staged.targets), M::all_mut(&mut self.batch.targets))?;
        }
        Ok(())
    }

    /// To be called before what the targets mean is checked.
    pub(crate) fn check_len(&self, targets: &[u32]) -> Result<()> {
        expect_len("targets", targets.len(), M::len(&self.batch.targets))
    }
}

impl<B: Backend<T>, T: Element> Input<B, T> {
    /// Crops, flips, normalises and cuts the present batch.
    pub(crate) fn make_pixels(&mut self, device: &B) -> Result<()> {
        match self.about.source {
            Source::Pixels => Ok(()),
            Source::Images => device.augment(augment::Args {
                dims: self.dims,
                images: B::all(&self.batch.images),
                draws: B::all(&self.batch.draws),
                mean: self.mean,
                std: self.std,
                x: B::all_mut(&mut self.pixels),
            }),
        }
    }
}

fn expect_len(argument: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Length { op: "load", argument, expected, got }) }
}
