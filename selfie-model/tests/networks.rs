//! The networks as a whole: gradients by central differences, gates, memory, determinism.

use selfie_kernels::{Cpu, Element, Wide};
use selfie_model::{
    Begin, Build, Classifier, Classify, Head, Inputs, LogitScale, MemoryPlan, Mode, ModelConfig, NamedScale, Negatives,
    Network, Positions, Preset, Purpose, Query, Selfie, Stem, Update,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Numbers in [-1, 1) that look random: splitmix64 of a seed.
fn noise(seed: u64, n: usize) -> impl Iterator<Item = f64> {
    (1..=n as u64).map(move |i| {
        let z = (seed << 32).wrapping_add(i).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) as i64 as f64 / 9_223_372_036_854_775_808.0
    })
}

fn small_stem() -> ModelConfig {
    ModelConfig {
        patch_size: Some(4),
        stem_width: 4,
        depths: [1, 2, 1, 1],
        ffn: 24,
        query: Query::Summary,
        pool_blocks: 3,
        dropout: 0.1,
        ..ModelConfig::preset(Preset::Tiny, 16)
    }
}

fn large_stem() -> ModelConfig {
    ModelConfig {
        image_size: 64,
        patch_size: Some(16),
        stem: Stem::Large,
        positions: Positions::RowCol,
        query: Query::Places,
        pool_blocks: 2,
        logit_scale: LogitScale::Named(NamedScale::InverseSqrt),
        ..small_stem()
    }
}

fn against_the_batch(config: ModelConfig) -> ModelConfig {
    let logit_scale = LogitScale::Named(NamedScale::None);
    ModelConfig { negatives: Negatives::Batch, temperature: 0.5, logit_scale, ..config }
}

fn build(config: &ModelConfig, batch: usize, purpose: Purpose) -> Build<'_> {
    Build { config, batch, purpose, seed: 1 }
}

/// With a rate that shows.
const STEP: Begin = Begin::Step { rate: 0.1 };

const NESTEROV: Update = Update { momentum: 0.9, weight_decay: 1e-4 };

fn cpu() -> Cpu {
    Cpu::new(2).expect("threads")
}

/// Both networks behind one face, to be fed with noise.
trait Subject: Network<Cpu, f64> {
    fn feed(&mut self, seed: u64);
}

/// `[b, h, w, 3]` noise with a colour of its own for each 4x4 cell, so that patches differ.
fn pixels(config: &ModelConfig, batch: usize, seed: u64) -> Vec<f64> {
    let side = config.image_size;
    let cells: Vec<f64> = noise(seed, batch * 48).collect();
    let mut pixels: Vec<f64> = noise(seed + 100, batch * side * side * 3).collect();
    for (i, v) in pixels.iter_mut().enumerate() {
        let (b, y, x, c) = (i / (side * side * 3), i / (side * 3) % side, i / 3 % side, i % 3);
        *v += cells[((b * 4 + 4 * y / side) * 4 + 4 * x / side) * 3 + c];
    }
    pixels
}

fn orders(batch: usize, seed: u64) -> Vec<u32> {
    let shift = seed as u32;
    (0..batch as u32).flat_map(|b| (0..16).map(move |i| (5 * i + 3 * b + shift) % 16)).collect()
}

impl Subject for Selfie<Cpu, f64> {
    fn feed(&mut self, seed: u64) {
        let (batch, side) = (self.sizes().batch, self.sizes().image[0]);
        let config = ModelConfig { image_size: side, ..small_stem() };
        self.put_pixels(&pixels(&config, batch, seed), &orders(batch, seed), 7 * seed).expect("inputs fit");
        self.begin(STEP).expect("inputs were put");
    }
}

impl Subject for Classifier<Cpu, f64> {
    fn feed(&mut self, seed: u64) {
        let (batch, side) = (self.sizes().batch, self.sizes().image[0]);
        let config = ModelConfig { image_size: side, ..small_stem() };
        let labels: Vec<u32> = (0..batch as u32).map(|i| i % 3).collect();
        self.put_pixels(&pixels(&config, batch, seed), &labels, 0).expect("inputs fit");
        self.begin(STEP).expect("inputs were put");
    }
}

fn selfie(config: &ModelConfig, batch: usize, purpose: Purpose) -> Selfie<Cpu, f64> {
    Selfie::new(cpu(), build(config, batch, purpose)).expect("a sound configuration")
}

fn classifier(config: &ModelConfig, batch: usize, purpose: Purpose) -> Classifier<Cpu, f64> {
    Classifier::new(cpu(), build(config, batch, purpose), 3).expect("a sound configuration")
}

fn forward_loss(network: &mut impl Subject) -> f64 {
    network.forward(Mode::Train).expect("a working device");
    network.loss().expect("a working device").loss
}

fn gradient(network: &mut impl Subject) -> Vec<f64> {
    network.forward(Mode::Train).expect("a working device");
    network.backward().expect("a working device");
    network.parameters().gradient.clone()
}

/// Along one random direction for each tensor, the slope of the loss is the gradient's.
fn check_gradient(network: &mut impl Subject) {
    network.feed(1);
    // Away from the initial values, whose zeros and ones hide mistakes.
    let (mut drawn, mut shifts) = (network.parameters().master.clone(), noise(9, usize::MAX));
    for entry in network.parameters().table.entries() {
        drawn[entry.range.clone()].iter_mut().zip(&mut shifts).for_each(|(p, e)| *p += 0.1 * e);
    }
    network.parameters_mut().master.copy_from_slice(&drawn);
    network.refresh_copy().expect("a working device");
    let gradient = gradient(network);
    for (i, entry) in network.parameters().table.clone().entries().iter().enumerate() {
        let range = entry.range.clone();
        let direction: Vec<f64> = noise(20 + i as u64, range.len()).collect();
        let mut shifted = |h: f64| {
            for (j, place) in range.clone().enumerate() {
                network.parameters_mut().master[place] = drawn[place] + h * direction[j];
            }
            network.refresh_copy().expect("a working device");
            forward_loss(network)
        };
        // Off by the rounding of a loss, some 1e-15, over h, and by the curvature times h^2; a ReLU or a maximum that
        // changes sides within h (none does here) would add h times the jump of its slope.
        let h = 1e-6;
        let slope = (shifted(h) - shifted(-h)) / (2.0 * h);
        shifted(0.0);
        let expected: f64 = gradient[range.clone()].iter().zip(&direction).map(|(g, d)| g * d).sum();
        let scale = gradient[range].iter().zip(&direction).map(|(g, d)| (g * d).powi(2)).sum::<f64>().sqrt();
        let bound = 1e-7 * scale + 1e-8;
        assert!((slope - expected).abs() <= bound, "{}: slope {slope:e}, gradient {expected:e}", entry.name);
    }
}

#[test]
fn gradients_of_pretraining_with_the_small_stem() {
    check_gradient(&mut selfie(&small_stem(), 3, Purpose::Train));
}

#[test]
fn gradients_of_pretraining_with_the_large_stem() {
    check_gradient(&mut selfie(&large_stem(), 2, Purpose::Train));
}

#[test]
fn gradients_without_positions_in_the_encoder() {
    let config = ModelConfig { encoder_positions: false, pool_blocks: 1, ..small_stem() };
    check_gradient(&mut selfie(&config, 3, Purpose::Train));
}

#[test]
fn gradients_with_negatives_of_the_batch() {
    for config in [small_stem(), ModelConfig { encoder_positions: false, ..small_stem() }, large_stem()] {
        check_gradient(&mut selfie(&against_the_batch(config), 3, Purpose::Train));
    }
}

#[test]
fn gradients_of_classification_with_the_small_stem() {
    check_gradient(&mut classifier(&small_stem(), 3, Purpose::Train));
}

#[test]
fn gradients_of_classification_with_the_large_stem() {
    check_gradient(&mut classifier(&large_stem(), 3, Purpose::Train));
}

#[test]
fn gradients_of_classification_by_attention() {
    for config in [small_stem(), large_stem()] {
        check_gradient(&mut classifier(&ModelConfig { head: Head::Attention, ..config }, 3, Purpose::Train));
    }
}

#[test]
fn micro_batches_add_up() {
    let plain = Update { momentum: 0.0, weight_decay: 0.0 };
    let mut network = selfie(&small_stem(), 2, Purpose::Accumulate);
    let before = network.parameters().master.clone();
    let (mut sum, mut losses) = (vec![0.0; before.len()], Vec::new());
    for (seed, begin) in [(1, STEP), (2, Begin::Part)] {
        let orders = orders(2, seed);
        network.put_pixels(&pixels(&small_stem(), 2, seed), &orders, 7 * seed).expect("inputs fit");
        network.begin(begin).expect("inputs were put");
        network.train_part(0.5).expect("built for it");
        for (sum, g) in sum.iter_mut().zip(&network.parameters().gradient) {
            *sum += 0.5 * g;
        }
        losses.push(network.loss().expect("a working device"));
    }
    network.update(plain).expect("a working device");
    let metrics = network.metrics().expect("a working device");
    // Two products and a sum of two numbers, in f64.
    let close = |found: f64, parts: [f64; 2]| {
        let mean = 0.5 * (parts[0] + parts[1]);
        assert!((found - mean).abs() <= 4.0 * f64::EPSILON * mean, "{found} {mean}");
    };
    close(metrics.loss, [losses[0].loss, losses[1].loss]);
    close(metrics.accuracy, [losses[0].accuracy, losses[1].accuracy]);
    for ((before, after), g) in before.iter().zip(&network.parameters().master).zip(&sum) {
        let expected = before - 0.1 * g;
        assert!((after - expected).abs() <= 4.0 * f64::EPSILON * (before.abs() + g.abs()), "{after} {expected}");
    }
    // The next update starts from nothing.
    network.feed(3);
    network.train_part(1.0).expect("built for it");
    network.update(plain).expect("a working device");
    let norm = network.parameters().gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
    let metrics = network.metrics().expect("a working device");
    assert!((metrics.gradient_norm / norm - 1.0).abs() < 1e-12);
    assert_eq!(metrics.loss, network.loss().expect("a working device").loss);
}

#[test]
fn a_step_that_is_not_finite_writes_nothing() {
    let mut network = classifier(&small_stem(), 2, Purpose::Train);
    let images = pixels(&small_stem(), 2, 1);
    let mut step = |bad: bool| {
        let mut images = images.clone();
        if bad {
            images[5] = f64::NAN;
        }
        network.put_pixels(&images, &[0, 1], 0).expect("inputs fit");
        network.begin(STEP).expect("inputs were put");
        network.train_step(NESTEROV).expect("a working device");
        let kept = (network.parameters().master.clone(), network.parameters().velocity.clone());
        (network.metrics().expect("a working device").finite, kept, network.statistics().running.clone())
    };
    let (finite, parameters, running) = step(false);
    assert!(finite);
    let (finite, same_parameters, same_running) = step(true);
    assert!(!finite);
    assert!(parameters == same_parameters && running == same_running);
    assert_ne!(step(false).1, parameters);
}

/// An evaluation network shares the memory of its blocks; its numbers are those of the training network.
#[test]
fn evaluation_is_the_same_in_either_network() {
    let config = ModelConfig { depths: [2, 2, 1, 2], ..small_stem() };
    for head in [Head::Conv, Head::Attention] {
        let config = ModelConfig { head, ..config.clone() };
        let mut training = classifier(&config, 2, Purpose::Train);
        training.feed(1);
        training.train_step(NESTEROV).expect("a working device");
        let mut evaluation = classifier(&config, 2, Purpose::Evaluate);
        evaluation.parameters_mut().master.copy_from_slice(&training.parameters().master);
        evaluation.statistics_mut().running.copy_from_slice(&training.statistics().running);
        evaluation.refresh_copy().expect("a working device");
        for network in [&mut training, &mut evaluation] {
            network.feed(2);
            network.forward(Mode::Evaluate).expect("a working device");
        }
        assert_eq!(training.logits(), evaluation.logits());
        assert!(evaluation.forward(Mode::Train).is_err() && evaluation.backward().is_err());
        assert!(training.backward().is_err(), "the last forward was an evaluation");
    }

    let (mut training, mut evaluation) = (selfie(&config, 2, Purpose::Train), selfie(&config, 2, Purpose::Evaluate));
    for network in [&mut training, &mut evaluation] {
        network.feed(2);
        network.forward(Mode::Evaluate).expect("a working device");
    }
    assert_eq!(training.loss().expect("a working device"), evaluation.loss().expect("a working device"));
    assert_eq!(training.summaries(), evaluation.summaries());
}

#[test]
fn the_puzzle_on_the_host_is_the_objective() {
    for config in [small_stem(), large_stem()] {
        let mut network = selfie(&config, 2, Purpose::Evaluate);
        network.feed(3);
        network.forward(Mode::Evaluate).expect("a working device");
        let logits = network.puzzle_logits().expect("a working device");
        let m = config.hidden_patches();
        let row_loss = |(i, row): (usize, &[f64])| row.iter().map(|v| v.exp()).sum::<f64>().ln() - row[i % m];
        let loss = logits.chunks_exact(m).enumerate().map(row_loss).sum::<f64>() / (2 * m) as f64;
        let expected = network.loss().expect("a working device").loss;
        assert!((loss - expected).abs() <= 1e-12 * expected.abs(), "{loss} {expected}");
    }
}

/// An image alone has no other negatives than its own; the padding of an evaluation is none.
#[test]
fn negatives_are_those_of_the_images_that_count() {
    for config in [small_stem(), large_stem()].map(against_the_batch) {
        let m = config.hidden_patches();
        let mut alone = selfie(&config, 1, Purpose::Evaluate);
        alone.feed(3);
        alone.forward(Mode::Evaluate).expect("a working device");
        let logits = alone.puzzle_logits().expect("a working device");
        let row_loss = |(i, row): (usize, &[f64])| row.iter().map(|v| v.exp()).sum::<f64>().ln() - row[i];
        let loss = logits.chunks_exact(m).enumerate().map(row_loss).sum::<f64>() / m as f64;
        let expected = alone.loss().expect("a working device");
        assert!((loss - expected.loss).abs() <= 1e-12 * expected.loss, "{loss} {expected:?}");

        // The same image, with another one that counts, or does not.
        let side = config.image_size;
        let images: Vec<u8> = noise(1, 2 * side * side * 3).map(|v| (127.5 * (v + 1.0)) as u8).collect();
        let score = |batch: usize, valid: usize| {
            let mut network = selfie(&config, batch, Purpose::Evaluate);
            let (draws, targets) = (vec![0; 3 * batch], orders(batch, 0));
            let images = &images[..batch * side * side * 3];
            let inputs = Inputs { images, draws: &draws, targets: &targets, first_sample: 0, valid };
            network.load(&inputs, Begin::Evaluation).expect("inputs fit");
            network.forward(Mode::Evaluate).expect("a working device");
            network.loss().expect("a working device")
        };
        let (alone, padded, both) = (score(1, 1), score(2, 1), score(2, 2));
        assert_eq!(alone, padded);
        // More negatives are harder; the accuracy is among those of the same image all the same.
        assert!(both.loss > alone.loss + 0.1, "{both:?} {alone:?}");
        assert!(both.accuracy >= alone.accuracy / 2.0, "{both:?} {alone:?}");
    }
}

/// The paper's network before its first step: what a loss of the first step should be.
#[test]
fn the_first_loss_is_the_methods() {
    let mut losses = Vec::new();
    for scale in [NamedScale::None, NamedScale::InverseSqrt] {
        let config = ModelConfig {
            logit_scale: LogitScale::Named(scale),
            dropout: 0.0,
            ..ModelConfig::preset(Preset::Resnet50, 32)
        };
        let mut network =
            Selfie::<Cpu, f32>::new(cpu(), build(&config, 8, Purpose::Train)).expect("a sound configuration");
        let images: Vec<f32> = pixels(&config, 8, 1).into_iter().map(|v| v as f32).collect();
        network.put_pixels(&images, &orders(8, 0), 0).expect("inputs fit");
        network.begin(STEP).expect("inputs were put");
        network.forward(Mode::Train).expect("a working device");
        losses.push(network.loss().expect("a working device"));
    }
    // 10 to 14, and 1.42, on photographs; 1.386 would be chance.
    assert!((8.0..16.0).contains(&losses[0].loss), "{losses:?}");
    assert!((1.39..1.6).contains(&losses[1].loss), "{losses:?}");
}

/// A step in `T` on `threads` threads from bytes: loss and new parameters.
fn step_from_bytes<T: Element>(config: &ModelConfig, threads: usize) -> (f64, Vec<f64>) {
    let device = Cpu::new(threads).expect("threads");
    let mut network = Selfie::<Cpu, T>::new(device, build(config, 8, Purpose::Train)).expect("a sound configuration");
    let images: Vec<u8> = noise(1, 8 * 32 * 32 * 3).map(|v| (127.5 * (v + 1.0)) as u8).collect();
    let draws: Vec<i32> = (0..24).map(|i| if i % 3 == 2 { i % 2 } else { i % 9 - 4 }).collect();
    let targets = orders(8, 0);
    let inputs = Inputs { images: &images, draws: &draws, targets: &targets, first_sample: 0, valid: 8 };
    network.load(&inputs, STEP).expect("inputs fit");
    network.train_step(NESTEROV).expect("a working device");
    let loss = network.loss().expect("a working device").loss;
    (loss, network.parameters().master.iter().map(|v| v.to_f64()).collect())
}

/// The step that a device may record is forward, backward and update; a batch that waits changes nothing in it.
#[test]
fn a_step_is_its_parts() {
    let config = large_stem();
    let images: Vec<u8> = noise(1, 4 * 64 * 64 * 3).map(|v| (127.5 * (v + 1.0)) as u8).collect();
    let (draws, targets) = ([0, 1, 1, 2, -3, 0], orders(2, 0));
    let inputs = |i: usize| Inputs {
        images: &images[i * 2 * 64 * 64 * 3..][..2 * 64 * 64 * 3],
        draws: &draws,
        targets: &targets,
        first_sample: 2 * i as u64,
        valid: 2,
    };
    let [mut whole, mut parts] = [(); 2].map(|()| selfie(&config, 2, Purpose::Train));
    whole.stage(&inputs(0)).expect("inputs fit");
    for i in 0..3 {
        whole.begin(STEP).expect("one was staged");
        whole.train_step(NESTEROV).expect("a working device");
        whole.stage(&inputs((i + 1) % 2)).expect("inputs fit");
        parts.load(&inputs(i % 2), STEP).expect("inputs fit");
        parts.forward(Mode::Train).expect("a working device");
        parts.backward().expect("a working device");
        parts.update(NESTEROV).expect("a working device");
        assert_eq!(whole.metrics(), parts.metrics());
    }
    assert!(whole.parameters().master == parts.parameters().master);
    assert!(whole.statistics().running == parts.statistics().running);
}

/// What lies between the tensors is read by kernels that take whole lines, and by the gradient's norm.
#[test]
fn tensors_are_aligned_and_what_lies_between_stays_zero() {
    let mut network = selfie(&large_stem(), 2, Purpose::Accumulate);
    for seed in [1, 2] {
        network.feed(seed);
        network.train_part(1.0).expect("built for it");
        network.update(NESTEROV).expect("a working device");
        assert!(network.metrics().expect("a working device").finite);
    }
    let (parameters, statistics) = (network.parameters(), network.statistics());
    for table in [&parameters.table, &statistics.table] {
        let mut end = 0;
        for entry in table.entries() {
            let behind = entry.range.start == end
                && [".bias", ".running_var", ".col"].iter().any(|name| entry.name.ends_with(name));
            assert!(behind || (2 * entry.range.start).is_multiple_of(256), "{entry:?}");
            assert!(entry.range.start >= end && entry.range.start - end < 128, "{entry:?} behind {end}");
            end = entry.range.end;
        }
        assert!((2 * table.len()).is_multiple_of(256) && table.len() - end < 128);
    }
    let between = |table: &selfie_model::Table, flat: &[f64]| -> f64 {
        let mut kept = flat.to_vec();
        table.entries().iter().for_each(|entry| kept[entry.range.clone()].fill(0.0));
        kept.into_iter().map(f64::abs).sum()
    };
    assert!(parameters.table.len() > parameters.table.elements());
    for flat in [&parameters.master, &parameters.copy, &parameters.gradient, &parameters.velocity] {
        assert_eq!(between(&parameters.table, flat), 0.0);
    }
    for flat in [&statistics.running, &statistics.batch] {
        assert_eq!(between(&statistics.table, flat), 0.0);
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let image = ModelConfig::preset(Preset::Tiny, 32);
    for config in [&image, &ModelConfig { negatives: Negatives::Batch, ..image.clone() }] {
        assert_eq!(step_from_bytes::<f32>(config, 1), step_from_bytes::<f32>(config, 2));
        assert_eq!(step_from_bytes::<half::bf16>(config, 1), step_from_bytes::<half::bf16>(config, 3));
    }
}

#[test]
fn bad_inputs_are_refused() {
    let config = small_stem();
    let mut network = selfie(&config, 2, Purpose::Train);
    let (images, draws) = (vec![0; 2 * 16 * 16 * 3], [0; 6]);
    let good = orders(2, 0);
    let mut refusal = |images: &[u8], draws: &[i32], targets: &[u32], valid| {
        let refused = network.stage(&Inputs { images, draws, targets, first_sample: 0, valid });
        refused.map_or_else(|error| error.to_string(), |()| "none".into())
    };
    assert_eq!(refusal(&images, &draws, &good, 2), "none");
    assert!(refusal(&images[1..], &draws, &good, 2).contains("images has 1535"));
    assert!(refusal(&images, &draws[1..], &good, 2).contains("draws has 5"));
    assert!(refusal(&images, &draws, &good[1..], 2).contains("targets has 31"));
    assert!(refusal(&images, &draws, &good, 0).contains("0 of 2 images"));
    for bad in [16, good[0]] {
        let mut order = good.clone();
        order[1] = bad;
        assert!(refusal(&images, &draws, &order, 2).contains("permutation"));
    }
    let mut network = classifier(&config, 2, Purpose::Train);
    let inputs = Inputs { images: &images, draws: &draws, targets: &[0, 3], first_sample: 0, valid: 2 };
    assert!(network.stage(&inputs).expect_err("there are three classes").to_string().contains("label 3"));
    assert!(network.begin(STEP).expect_err("nothing sound was staged").to_string().contains("no batch was staged"));
    network.feed(1);
    assert!(network.train_part(1.0).is_err());
    assert!(classifier(&config, 2, Purpose::Accumulate).train_step(NESTEROV).is_err());
    assert!(classifier(&config, 2, Purpose::Evaluate).train_step(NESTEROV).is_err());
}

/// Counts the bytes that the thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged; the counter allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.set(HELD.get().wrapping_add(layout.size()));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        HELD.set(HELD.get().wrapping_sub(layout.size()));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that `new` holds beyond the plan: names and tables, the same for every width and batch.
fn beyond_the_plan<N>(plan: MemoryPlan, new: impl FnOnce() -> N) -> usize {
    let before = HELD.get();
    let network = new();
    let held = HELD.get().wrapping_sub(before);
    drop(network);
    held.checked_sub(plan.total_bytes()).expect("as much as planned is held")
}

#[test]
fn the_plan_is_what_is_allocated() {
    let device = std::sync::Arc::new(cpu());
    for base in [small_stem(), large_stem()] {
        for purpose in [Purpose::Train, Purpose::Accumulate, Purpose::Evaluate] {
            let beyond = |stem_width: usize, batch: usize| {
                let config = ModelConfig { stem_width, ..base.clone() };
                let build = build(&config, batch, purpose);
                let plan = Selfie::<Cpu, f32>::memory_plan(build).expect("a sound configuration");
                let selfie = beyond_the_plan(plan, || Selfie::<Cpu, f32>::new(device.clone(), build));
                let classifier = |head| {
                    let config = ModelConfig { head, ..config.clone() };
                    let build = Build { config: &config, ..build };
                    let plan = Classifier::<Cpu, f32>::memory_plan(build, 3).expect("a sound configuration");
                    beyond_the_plan(plan, || Classifier::<Cpu, f32>::new(device.clone(), build, 3))
                };
                let negatives = against_the_batch(config.clone());
                let build = Build { config: &negatives, ..build };
                let plan = Selfie::<Cpu, f32>::memory_plan(build).expect("a sound configuration");
                let batch = beyond_the_plan(plan, || Selfie::<Cpu, f32>::new(device.clone(), build));
                [selfie, batch, classifier(Head::Conv), classifier(Head::Attention)]
            };
            let overhead = beyond(4, 2);
            assert!(overhead.iter().all(|&bytes| bytes < 1 << 16), "{overhead:?} bytes of names and tables");
            assert_eq!(overhead, beyond(4, 5));
            assert_eq!(overhead, beyond(12, 3));
        }
    }
}

/// Scratch is no part of a network's own buffers, and what the device announces for it is enough.
#[test]
fn scratch_stays_within_the_plans_row() {
    let config = ModelConfig { depths: [1, 1, 1, 1], ..ModelConfig::preset(Preset::Resnet50, 32) };
    let build = build(&config, 4, Purpose::Train);
    let device = std::sync::Arc::new(cpu());
    let mut network = Classifier::<Cpu, f32>::new(device.clone(), build, 3).expect("a sound configuration");
    let images: Vec<f32> = pixels(&config, 4, 1).into_iter().map(|v| v as f32).collect();
    network.put_pixels(&images, &[0, 1, 2, 0], 0).expect("inputs fit");
    network.begin(STEP).expect("inputs were put");
    network.train_step(NESTEROV).expect("a working device");
    let plan = Classifier::<Cpu, f32>::memory_plan(build, 3).expect("a sound configuration").with_workspace(&*device);
    let (_, announced) = plan.summary().into_iter().find(|(name, _)| *name == "workspace").expect("a row of its own");
    let held = device.scratch_bytes();
    assert!(0 < held && held <= announced, "{held} of {announced} bytes");
}

#[test]
fn evaluation_takes_a_fraction_of_the_memory() {
    let config = ModelConfig::preset(Preset::Resnet50, 32);
    let bytes = |purpose| {
        let plan =
            Classifier::<Cpu, f32>::memory_plan(build(&config, 256, purpose), 10).expect("a sound configuration");
        plan.total_bytes()
    };
    assert!(2 * bytes(Purpose::Evaluate) < bytes(Purpose::Train));
}
