//! The way in: a batch from the host to the network's input on the device.

use crate::memory_plan::Ledger;
use crate::state::Buffer;
use crate::{Inputs, ModelConfig};
use selfie_kernels::augment::{self, AugmentDims};
use selfie_kernels::{Backend, Element, Error, Memory, Result};

/// A batch on the device.
#[derive(Debug)]
pub(crate) struct Input<M: Memory, T: Element> {
    dims: AugmentDims,
    mean: [f64; 3],
    std: [f64; 3],
    images: Buffer<M, u8>,
    draws: Buffer<M, i32>,
    /// `[n, targets]`: see [`Inputs::targets`].
    pub(crate) targets: Buffer<M, u32>,
    /// `[n * grid * grid, patch, patch, 3]`, normalised.
    pub(crate) pixels: Buffer<M, T>,
    /// Images that count.
    pub(crate) valid: usize,
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
        ledger.scope("input");
        Ok(Self {
            dims,
            mean: config.mean,
            std: config.std,
            images: ledger.alloc("images", batch * side * side * 3)?,
            draws: ledger.alloc("draws", batch * 3)?,
            targets: ledger.alloc("targets", batch * targets)?,
            pixels: ledger.alloc("pixels", dims.len_out())?,
            valid: batch,
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
}

impl<B: Backend<T>, T: Element> Input<B, T> {
    /// Uploads, crops, flips, normalises and cuts. The caller has checked what the targets mean.
    pub(crate) fn load(&mut self, device: &B, inputs: &Inputs<'_>) -> Result<()> {
        expect_len("images", inputs.images.len(), B::len(&self.images))?;
        expect_len("draws", inputs.draws.len(), B::len(&self.draws))?;
        self.load_targets(device, inputs.targets, inputs.valid)?;
        device.upload(inputs.images, B::all_mut(&mut self.images))?;
        device.upload(inputs.draws, B::all_mut(&mut self.draws))?;
        device.augment(augment::Args {
            dims: self.dims,
            images: B::all(&self.images),
            draws: B::all(&self.draws),
            mean: self.mean,
            std: self.std,
            x: B::all_mut(&mut self.pixels),
        })
    }

    /// Takes `[n, h, w, 3]` as it is, cut into patches.
    pub(crate) fn load_pixels(&mut self, device: &B, pixels: &[T], targets: &[u32]) -> Result<()> {
        let AugmentDims { n, h, w, grid, patch } = self.dims;
        expect_len("pixels", pixels.len(), n * h * w * 3)?;
        self.load_targets(device, targets, n)?;
        let mut cut = Vec::with_capacity(pixels.len());
        for image in pixels.chunks_exact(h * w * 3) {
            for (row, column) in (0..grid * grid).map(|i| (i / grid, i % grid)) {
                for y in row * patch..(row + 1) * patch {
                    let start = (y * w + column * patch) * 3;
                    cut.extend_from_slice(&image[start..start + patch * 3]);
                }
            }
        }
        device.upload(&cut, B::all_mut(&mut self.pixels))
    }

    /// To be called before what the targets mean is checked.
    pub(crate) fn check_len(&self, targets: &[u32]) -> Result<()> {
        expect_len("targets", targets.len(), B::len(&self.targets))
    }

    fn load_targets(&mut self, device: &B, targets: &[u32], valid: usize) -> Result<()> {
        if !(1..=self.dims.n).contains(&valid) {
            let reason = format!("{valid} of {} images valid", self.dims.n);
            return Err(Error::Dims { op: "load", reason });
        }
        self.valid = valid;
        device.upload(targets, B::all_mut(&mut self.targets))
    }
}

fn expect_len(argument: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Length { op: "load", argument, expected, got }) }
}
