//! From an image to vectors ([`Pooling`]): the average over the backbone's last map, that of each of its patches, or what the
//! attention pooling makes of the map's cells.

use crate::attention_pool::{AttentionPool, AttentionPoolActs};
use crate::layers::Tables;
use crate::memory_plan::Ledger;
use crate::network::Build;
use crate::resnet::{Resnet, ResnetActs};
use crate::state::{Buffer, State};
use crate::{Error, Pooling, Purpose, Result};
use selfie_kernels::{Backend, Element, Memory, View, Wide};

/// Backbone, and perhaps a pooling by attention: `[n, side, side, 3]` to `[n, m, width]`, m being 1 for whole images.
#[derive(Debug)]
pub(crate) struct Features {
    n: usize,
    /// Vectors of all images.
    vectors: usize,
    /// Along a side of an image.
    grid: usize,
    backbone: Resnet,
    pool: Option<AttentionPool>,
}

/// What [`Features`] keeps for the backward pass.
#[derive(Debug)]
pub(crate) struct FeaturesActs<M: Memory, T: Element> {
    backbone: ResnetActs<M, T>,
    /// `[n, cells, width]`: averages over the map or its cells, and their gradient.
    h: Buffer<M, T>,
    dh: Buffer<M, T>,
    pool: Option<PoolActs<M, T>>,
}

#[derive(Debug)]
struct PoolActs<M: Memory, T: Element> {
    /// `[n, cells]`: every image's cells, row by row.
    order: Buffer<M, u32>,
    acts: AttentionPoolActs<M, T>,
}

impl Features {
    /// The first `stages` stages, with the pooling by attention where that is asked for.
    ///
    /// # Errors
    /// Patches that do not divide the image; a map that the places of pretraining do not divide into cells.
    pub(crate) fn new(tables: &mut Tables, build: Build<'_>, stages: usize, pooling: Pooling) -> Result<Self> {
        let Build { config, batch: n, .. } = build;
        let grid = match pooling {
            Pooling::Patches => config.places(n)?.grid,
            Pooling::Map | Pooling::Attention => 1,
        };
        let vectors = n * grid * grid;
        let backbone = Resnet::new(tables, config, stages, vectors, config.image_size / grid);
        build.check_rows(backbone.rows())?;
        match pooling {
            Pooling::Map | Pooling::Patches => Ok(Self { n, vectors, grid, backbone, pool: None }),
            Pooling::Attention => {
                let places = config.places(n)?;
                let side = backbone.side();
                let backbone = backbone.with_cells(places.grid).ok_or_else(|| {
                    let expected = format!(
                        "larger patches, or another head: the map of stage {stages} is {side} x {side}, which {grid} x {grid} \
                         cells do not divide",
                        grid = places.grid
                    );
                    Error::usage("model.patch_size", config.patch_side(), expected)
                })?;
                let pool = AttentionPool::new(tables, config, places);
                Ok(Self { n, vectors, grid, backbone, pool: Some(pool) })
            }
        }
    }

    /// Patches along a side of an image as it goes through the network; 1 for whole images.
    pub(crate) fn grid(&self) -> usize {
        self.grid
    }

    /// Numbers of a vector.
    pub(crate) fn width(&self) -> usize {
        self.backbone.width()
    }

    /// Numbers of a vector behind the first `stages` stages.
    pub(crate) fn width_behind(&self, stages: usize) -> usize {
        self.backbone.width_behind(stages)
    }

    /// Elements of the largest partial sums.
    pub(crate) fn partial_len(&self) -> usize {
        self.backbone.partial_len()
    }

    pub(crate) fn acts<M: Memory, T: Element>(
        &self,
        ledger: &mut Ledger<M>,
        purpose: Purpose,
    ) -> Result<FeaturesActs<M, T>> {
        let backbone = self.backbone.acts(ledger, purpose)?;
        ledger.scope("features");
        let len = self.backbone.len_out();
        let h = ledger.alloc("h", len)?;
        let dh = ledger.alloc("dh", purpose.trained(len))?;
        let pool = match &self.pool {
            None => None,
            Some(pool) => {
                let order = ledger.alloc("order", len / self.width())?;
                Some(PoolActs { order, acts: pool.acts(ledger, purpose)? })
            }
        };
        Ok(FeaturesActs { backbone, h, dh, pool })
    }

    /// Writes what does not change from batch to batch. Once, before the first.
    pub(crate) fn prepare<B: Backend<T>, T: Element>(&self, device: &B, acts: &mut FeaturesActs<B, T>) -> Result<()> {
        if let Some(PoolActs { order, .. }) = &mut acts.pool {
            let cells = (B::len(order) / self.n) as u32;
            let cells: Vec<u32> = (0..self.n).flat_map(|_| 0..cells).collect();
            device.upload(&cells, B::all_mut(order))?;
        }
        Ok(())
    }

    /// From pixels to [`Features::output`].
    pub(crate) fn forward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        pixels: &Buffer<B, T>,
        acts: &mut FeaturesActs<B, T>,
    ) -> selfie_kernels::Result<()> {
        let FeaturesActs { backbone, h, pool, .. } = acts;
        self.backbone.forward(state, pixels, backbone, h)?;
        match (&self.pool, pool) {
            (Some(pool), Some(PoolActs { order, acts })) => pool.forward(state, h, order, acts),
            _ => Ok(()),
        }
    }

    /// From pixels to [`Features::averages`] behind the first `stages` stages.
    pub(crate) fn forward_behind<B: Backend<T>, T: Element>(
        &self,
        stages: usize,
        state: &mut State<B, T>,
        pixels: &Buffer<B, T>,
        acts: &mut FeaturesActs<B, T>,
    ) -> selfie_kernels::Result<()> {
        self.backbone.forward_behind(stages, state, pixels, &mut acts.backbone, &mut acts.h)
    }

    /// `[n, m, width_behind(stages)]`: the averages over the map, of the last such forward.
    pub(crate) fn averages<'a, M: Memory, T: Element>(
        &self,
        acts: &'a FeaturesActs<M, T>,
        stages: usize,
    ) -> View<'a, M, T> {
        M::view(&acts.h, 0..self.vectors * self.width_behind(stages))
    }

    /// Where the last forward left its vectors: `[n, m, width]`, and perhaps room behind.
    pub(crate) fn output<'a, M: Memory, T: Element>(&self, acts: &'a FeaturesActs<M, T>) -> &'a Buffer<M, T> {
        match (&self.pool, &acts.pool) {
            (Some(pool), Some(PoolActs { acts, .. })) => pool.output(acts),
            _ => &acts.h,
        }
    }

    /// `[n, m, width]`: the vectors of the last forward.
    pub(crate) fn vectors<'a, M: Memory, T: Element>(&self, acts: &'a FeaturesActs<M, T>) -> View<'a, M, T> {
        M::view(self.output(acts), 0..self.vectors * self.width())
    }

    /// Where their gradient belongs before [`Features::backward`].
    pub(crate) fn output_gradient_mut<'a, M: Memory, T: Element>(
        &self,
        acts: &'a mut FeaturesActs<M, T>,
    ) -> &'a mut Buffer<M, T> {
        match (&self.pool, &mut acts.pool) {
            (Some(pool), Some(PoolActs { acts, .. })) => pool.output_gradient_mut(acts),
            _ => &mut acts.dh,
        }
    }

    /// All parameters' gradients.
    pub(crate) fn backward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        pixels: &Buffer<B, T>,
        acts: &mut FeaturesActs<B, T>,
    ) -> selfie_kernels::Result<()> {
        let FeaturesActs { backbone, dh, pool, .. } = acts;
        if let (Some(pool), Some(PoolActs { order, acts })) = (&self.pool, pool) {
            // No objective has written their gradient, which is added to.
            state.device.zero(B::view_mut(&mut state.parameters.gradient, pool.positions()))?;
            pool.backward(state, order, acts, dh)?;
        }
        self.backbone.backward(state, pixels, backbone, dh)
    }
}

/// The mean of the vectors `[m, width]` of an image. A single one is its own mean.
pub(crate) fn mean_vector<T: Element>(vectors: &[T], width: usize) -> impl Iterator<Item = f64> {
    let m = (vectors.len() / width) as f64;
    let number = move |j| vectors.iter().skip(j).step_by(width).map(|x| x.widen().to_f64()).sum::<f64>() / m;
    (0..width).map(number)
}
