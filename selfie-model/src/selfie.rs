//! Pretraining: which hidden patch belongs at which hidden place.

use crate::attention_pool::{AttentionPool, AttentionPoolActs};
use crate::batch_negatives::{BatchNegatives, Puzzle};
use crate::config::Pretext;
use crate::input::Input;
use crate::layers::Tables;
use crate::memory_plan::{Dry, Ledger};
use crate::network::{Build, Passes};
use crate::resnet::{Resnet, ResnetActs};
use crate::state::{Buffer, State, StateArgs};
use crate::{MemoryPlan, Mode, Result};
use selfie_kernels::attention::MAX_TOKENS;
use selfie_kernels::tokens::PositionKind;
use selfie_kernels::{Backend, Element, Error, Memory, View, Wide, contrast};
use std::sync::Arc;

/// Stages of the patch network.
pub(crate) const STAGES: usize = 3;

/// The patch network, the attention pooling and the contrastive objective.
///
/// Source: Trinh, Luong, Le 2019 (arXiv 1906.02940).
#[derive(Debug)]
pub struct Selfie<B: Memory, T: Element> {
    pretext: Pretext,
    patches: Resnet,
    pool: AttentionPool,
    state: State<B, T>,
    input: Input<B, T>,
    patches_acts: ResnetActs<B, T>,
    /// `[b, n, d]`: features of all patches, and their gradient.
    h: Buffer<B, T>,
    dh: Buffer<B, T>,
    pool_acts: AttentionPoolActs<B, T>,
    /// Where the whole batch is what patches are told apart from.
    batch_negatives: Option<BatchNegatives<B, T>>,
}

impl<B: Memory, T: Element> Selfie<B, T> {
    /// The buffers of such a network, without allocating them.
    ///
    /// # Errors
    /// Impossible configurations.
    pub fn memory_plan(build: Build<'_>) -> Result<MemoryPlan> {
        let mut ledger = Ledger::new(Dry);
        Selfie::<Dry, T>::build(&mut ledger, build)?;
        Ok(ledger.into_plan())
    }

    fn build(ledger: &mut Ledger<B>, build: Build<'_>) -> Result<Self> {
        let Build { config, batch, purpose, .. } = build.checked()?;
        let pretext = config.pretext(batch)?;
        let (n, d) = (pretext.dims.n(), pretext.dims.d);

        let mut tables = Tables::default();
        let patches = Resnet::new(&mut tables, config, STAGES, batch * n, pretext.patch);
        build.check_rows(patches.rows())?;
        let pool = AttentionPool::new(&mut tables, config, pretext.dims);

        let input = Input::new(ledger, config, batch, pretext.dims.grid, n)?;
        let patches_acts = patches.acts(ledger, purpose)?;
        ledger.scope("patches");
        let h = ledger.alloc("h", batch * n * d)?;
        let dh = ledger.alloc("dh", purpose.trained(batch * n * d))?;
        let pool_acts = pool.acts(ledger, purpose)?;
        let negatives = |temperature| BatchNegatives::new(ledger, pretext.dims, temperature, purpose);
        let batch_negatives = pretext.temperature.map(negatives).transpose()?;
        let partial = patches.partial_len();
        let state = State::new(ledger, StateArgs { build, tables, partial })?;
        Ok(Self { pretext, patches, pool, state, input, patches_acts, h, dh, pool_acts, batch_negatives })
    }
}

impl<B: Backend<T>, T: Element> Selfie<B, T> {
    /// Allocates everything and draws the initial parameters.
    ///
    /// # Errors
    /// Impossible configurations; out of memory.
    pub fn new(device: impl Into<Arc<B>>, build: Build<'_>) -> Result<Self> {
        let mut network = Self::build(&mut Ledger::new(device), build)?;
        if let Some(negatives) = &mut network.batch_negatives {
            negatives.prepare(&*network.state.device)?;
        }
        network.state.initialise(build.config)?;
        Ok(network)
    }

    /// `[b, q, d]`: the attention pooling's summaries of the visible patches in the last forward. With `Query::Places` q
    /// is the number of patches, of which the first ones, the hidden ones, ask.
    pub fn summaries(&self) -> View<'_, B, T> {
        self.pool.summary(&self.pool_acts)
    }

    /// `[b, hidden, hidden]`: the last forward's logits, computed on the host, to show a puzzle. Row l is the l-th hidden
    /// place, column j the j-th hidden patch of the same image, in the order of [`crate::Inputs::targets`].
    ///
    /// # Errors
    /// Those of the device.
    pub fn puzzle_logits(&self) -> selfie_kernels::Result<Vec<f64>> {
        let dims = self.pretext.dims;
        let scale = |query: &[f64], key: &[f64]| match self.pretext.temperature {
            None => self.pretext.logit_scale,
            Some(temperature) => {
                let squares = |vector: &[f64]| vector.iter().map(|x| x * x).sum::<f64>();
                1.0 / (temperature * (squares(query) * squares(key)).sqrt())
            }
        };
        let (h, u) = (self.state.read(B::all(&self.h))?, self.state.read(self.summaries())?);
        let positions = self.state.read(B::view(&self.state.parameters.master, self.pool.positions()))?;
        let mut order = vec![0; dims.b * dims.n()];
        self.state.device.download(B::all(self.input.targets()), &mut order)?;
        let position = |place: usize, i: usize| match dims.positions {
            PositionKind::Table => positions[place * dims.d + i].to_f64(),
            PositionKind::RowCol => {
                let (row, column) = (place / dims.grid, dims.grid + place % dims.grid);
                positions[row * dims.d + i].to_f64() + positions[column * dims.d + i].to_f64()
            }
        };
        let mut logits = Vec::with_capacity(dims.b * dims.hidden * dims.hidden);
        for (b, order) in order.chunks_exact(dims.n()).enumerate() {
            let hidden = || order[..dims.hidden].iter().map(|&patch| patch as usize);
            for (l, place) in hidden().enumerate() {
                let asking = b * self.pool.query_stride() + l.min(dims.q() - 1) * dims.d;
                let query: Vec<f64> =
                    (0..dims.d).map(|i| u[asking + i].widen().to_f64() + position(place, i)).collect();
                for patch in hidden() {
                    let key = &h[(b * dims.n() + patch) * dims.d..][..dims.d];
                    let key: Vec<f64> = key.iter().map(|x| x.widen().to_f64()).collect();
                    let product: f64 = query.iter().zip(&key).map(|(q, k)| q * k).sum();
                    logits.push(scale(&query, &key) * product);
                }
            }
        }
        Ok(logits)
    }
}

impl<B: Backend<T>, T: Element> Passes<B, T> for Selfie<B, T> {
    fn state(&self) -> &State<B, T> {
        &self.state
    }

    fn input(&self) -> &Input<B, T> {
        &self.input
    }

    fn parts_mut(&mut self) -> (&mut State<B, T>, &mut Input<B, T>) {
        (&mut self.state, &mut self.input)
    }

    fn vectors(&self) -> (View<'_, B, T>, usize) {
        (B::all(&self.h), self.pretext.dims.d)
    }

    /// Each image's order must be a permutation: the operations index by it.
    fn check_targets(&self, order: &[u32]) -> selfie_kernels::Result<()> {
        self.input.check_len(order)?;
        let n = self.pretext.dims.n();
        for (image, order) in order.chunks(n).enumerate() {
            let mut seen = [false; MAX_TOKENS];
            for &patch in order {
                let first = (patch as usize) < n && !std::mem::replace(&mut seen[patch as usize], true);
                if !first {
                    let reason = format!("image {image}: the order is no permutation of 0..{n}: {patch}");
                    return Err(Error::Dims { op: "load", reason });
                }
            }
        }
        Ok(())
    }

    fn pass_forward(&mut self) -> selfie_kernels::Result<()> {
        let Self { pretext, patches, pool, state, input, patches_acts, h, dh, pool_acts, batch_negatives } = self;
        patches.forward(state, &input.pixels, patches_acts, h)?;
        pool.forward(state, h, input.targets(), pool_acts)?;
        let (u, du) = pool.output_and_gradient(pool_acts);
        let (valid, u_stride, positions) = (input.about.valid, pool.query_stride(), pool.positions());
        if let Some(negatives) = batch_negatives {
            return negatives.score(state, Puzzle { valid, u_stride, u, du, h, dh, order: input.targets(), positions });
        }
        let len = pretext.dims.b * u_stride;
        state.device.contrast(contrast::Args {
            dims: pretext.dims,
            valid,
            logit_scale: pretext.logit_scale,
            u_stride,
            u: B::view(u, 0..len),
            h: B::all(h),
            order: B::all(input.targets()),
            positions: B::view(&state.parameters.master, positions.clone()),
            loss: state.metrics.loss_mut(),
            gradients: (state.mode == Mode::Train).then(|| contrast::Gradients {
                du: B::view_mut(du, 0..len),
                dh: B::all_mut(dh),
                dpositions: B::view_mut(&mut state.parameters.gradient, positions),
            }),
        })
    }

    fn pass_backward(&mut self) -> selfie_kernels::Result<()> {
        let Self { patches, pool, state, input, patches_acts, dh, pool_acts, .. } = self;
        pool.backward(state, input.targets(), pool_acts, dh)?;
        patches.backward(state, &input.pixels, patches_acts, dh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ModelConfig, Positions, Preset, Purpose};

    fn table(config: &ModelConfig) -> crate::Table {
        let build = Build { config, batch: 1, purpose: Purpose::Train, seed: 0 };
        Selfie::<Dry, f32>::build(&mut Ledger::new(Dry), build).expect("sound").state.parameters.table
    }

    #[test]
    fn parameter_counts() {
        let table = table(&ModelConfig::preset(Preset::Resnet50, 32));
        let patches = table.entries().iter().filter(|entry| !entry.name.starts_with("pool."));
        assert_eq!(patches.map(crate::Entry::len).sum::<usize>(), 8_532_032);
        assert_eq!(table.elements(), 25_094_080);
    }

    #[test]
    fn positions_follow_the_grid() {
        let mut config = ModelConfig::preset(Preset::Tiny, 32);
        assert_eq!(table(&config).get("pool.pos").expect("16 places").shape, [16, 128]);
        config.positions = Positions::RowCol;
        assert_eq!(table(&config).get("pool.row").expect("asked for").shape, [4, 128]);
        config = ModelConfig::preset(Preset::Tiny, 224);
        assert_eq!(table(&config).get("pool.col").expect("49 places").shape, [7, 128]);
        assert_eq!((config.patches(), config.hidden_patches()), (49, 12));
    }
}
