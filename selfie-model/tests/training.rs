//! Training is a function of configuration, data and step: not of threads, workers, interruptions or evaluations.

use half::bf16;
use safetensors::SafeTensors;
use selfie_data::{DEFAULT_MAX_BAD, Dataset, Geometry, Image, Need, Split};
use selfie_kernels::{Backend, Cpu, Element, Memory, Scalar, Wide};
use selfie_model::{
    Build, CheckpointStore, Classifier, Error, ErrorKind, Images, ModelConfig, Network, PhiloxDraws, Preset, Purpose,
    Replay, Selfie, TrainConfig, Trainer, classify, evaluate,
};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A network small enough for many steps.
fn model() -> ModelConfig {
    ModelConfig { stem_width: 4, heads: 2, ffn: 40, pool_blocks: 2, ..ModelConfig::preset(Preset::Tiny, 32) }
}

/// 4 images a step; 22 images, so that every epoch ends inside a batch.
fn config() -> TrainConfig {
    TrainConfig { steps: Some(8), batch: 4, lr: 0.05, seed: 11, ..TrainConfig::default() }
}

fn images(split: Split, workers: usize) -> Images {
    let world = Path::new("synthetic:train=22,test=7,classes=3");
    let dataset = selfie_data::open(world, split, Need::Labels, &PhiloxDraws::seeded).expect("the synthetic world");
    Images { items: (0..dataset.len()).collect(), dataset, workers, max_bad: DEFAULT_MAX_BAD }
}

fn cpu(threads: usize) -> Cpu {
    Cpu::new(threads).expect("threads")
}

fn purpose(config: &TrainConfig) -> Purpose {
    if config.accumulate > 1 { Purpose::Accumulate } else { Purpose::Train }
}

fn selfie<T: Element>(threads: usize, config: &TrainConfig) -> Selfie<Cpu, T>
where
    Cpu: Backend<T>,
{
    let model = model();
    let build = Build { config: &model, batch: config.micro_batch(), purpose: purpose(config), seed: config.seed };
    Selfie::new(cpu(threads), build).expect("a sound configuration")
}

fn classifier<T: Element>(threads: usize, config: &TrainConfig) -> Classifier<Cpu, T>
where
    Cpu: Backend<T>,
{
    let model = model();
    let build = Build { config: &model, batch: config.micro_batch(), purpose: purpose(config), seed: config.seed };
    Classifier::new(cpu(threads), build, 3).expect("a sound configuration")
}

fn trainer<T: Element, N: Network<Cpu, T>>(network: N, workers: usize, config: &TrainConfig) -> Trainer<Cpu, T, N>
where
    Cpu: Backend<T>,
{
    Trainer::new(network, images(Split::Train, workers), config, None).expect("it fits")
}

/// The bytes of everything that training changes.
fn bits<T: Element, N: Network<Cpu, T>>(network: &N) -> Vec<Vec<u8>>
where
    Cpu: Backend<T>,
{
    fn bytes<S: Scalar>(network_buffer: &Vec<S>) -> Vec<u8> {
        bytemuck::cast_slice(Cpu::all(network_buffer)).to_vec()
    }
    let (parameters, statistics) = (network.parameters(), network.statistics());
    vec![bytes(&parameters.master), bytes(&parameters.copy), bytes(&parameters.velocity), bytes(&statistics.running)]
}

/// Takes the steps that are left; the losses.
fn finish<T: Element, N: Network<Cpu, T>>(trainer: &mut Trainer<Cpu, T, N>) -> Vec<f64>
where
    Cpu: Backend<T>,
{
    let mut losses = Vec::new();
    while !trainer.is_over() {
        let metrics = trainer.step().expect("a finite step");
        assert!(metrics.finite && metrics.images == 4);
        losses.push(metrics.loss);
    }
    losses
}

/// 8 steps in one go, and the same with a stop after 3: other threads, other workers, an evaluation in between, and a
/// new network from the checkpoint.
fn resume_is_exact<T: Element, N: Network<Cpu, T>>(
    config: &TrainConfig,
    network: impl Fn(usize, &TrainConfig) -> N,
) -> Vec<f64>
where
    Cpu: Backend<T>,
{
    let mut whole = trainer(network(1, config), 0, config);
    let losses = finish(&mut whole);
    assert_eq!(losses.len(), 8);

    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = CheckpointStore::new(folder.path(), 2);
    let settings = json!({ "train": config });
    let mut stopped = trainer(network(2, config), 2, config);
    let mut again: Vec<f64> = (0..3).map(|_| stopped.step().expect("a finite step").loss).collect();
    stopped.save(&store, &settings).expect("a writable folder");
    drop(stopped);

    let newest = store.newest().expect("sound").expect("one was saved");
    assert_eq!(newest.checkpoint.config, settings);
    assert_eq!(newest.checkpoint.progress.step, 3);
    let resumed = network(2, config);
    let mut resumed =
        Trainer::new(resumed, images(Split::Train, 1), config, Some(&newest.checkpoint)).expect("it fits");
    let held_out = images(Split::Test, 1);
    let first = resumed.evaluate(&held_out).expect("sound images");
    assert_eq!(first, resumed.evaluate(&held_out).expect("sound images"));
    again.push(resumed.step().expect("a finite step").loss);
    // With the next step's batch already on the device.
    assert_ne!(first, resumed.evaluate(&held_out).expect("sound images"));
    again.extend(finish(&mut resumed));
    assert_eq!(again, losses);
    assert_eq!(bits(resumed.network()), bits(whole.network()));
    losses
}

#[test]
fn pretraining_resumes_exactly() {
    resume_is_exact::<f32, _>(&config(), selfie::<f32>);
}

#[test]
fn pretraining_in_bf16_resumes_exactly() {
    resume_is_exact::<bf16, _>(&config(), selfie::<bf16>);
}

#[test]
fn finetuning_resumes_exactly() {
    resume_is_exact::<f32, _>(&config(), classifier::<f32>);
}

#[test]
fn micro_batches_resume_exactly() {
    let parts = TrainConfig { accumulate: 2, ..config() };
    let losses = resume_is_exact::<f32, _>(&parts, selfie::<f32>);
    let whole = finish(&mut trainer(selfie::<f32>(1, &config()), 0, &config()));
    assert_ne!(losses, whole, "batch normalisation sees the micro-batch");
}

/// The second step's batch by name, as [`Trainer::write_step`] writes it.
fn second_batch(config: &TrainConfig) -> BTreeMap<String, Vec<u8>> {
    batch_of(2, config)
}

fn batch_of(step: usize, config: &TrainConfig) -> BTreeMap<String, Vec<u8>> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("step.safetensors");
    let mut trainer = trainer(selfie::<f32>(1, config), 0, config);
    for _ in 0..step {
        trainer.step().expect("a finite step");
    }
    trainer.write_step(&path, &model(), None).expect("a writable folder");
    let bytes = std::fs::read(path).expect("written");
    let file = SafeTensors::deserialize(&bytes).expect("ours");
    let batch = file.iter().filter(|(name, _)| name.starts_with("batch."));
    batch.map(|(name, view)| (name.to_string(), view.data().to_vec())).collect()
}

/// The images of a step, their crops and their masks do not depend on how it is cut.
#[test]
fn micro_batches_are_the_batch_in_parts() {
    let parts = TrainConfig { accumulate: 4, ..config() };
    assert_eq!(second_batch(&config()), second_batch(&parts));
}

/// Pretraining flips images but never shifts them: the border would tell where a patch lies.
#[test]
fn images_are_augmented_unless_told_otherwise() {
    let drawn = |augment| {
        let mut draws = Vec::new();
        for seed in 0..8 {
            let batch = second_batch(&TrainConfig { augment, seed, ..config() });
            assert_eq!([batch["batch.images"].len(), batch["batch.targets"].len()], [4 * 32 * 32 * 3, 4 * 16 * 4]);
            let words = &batch["batch.draws"];
            draws.extend(words.chunks_exact(4).map(|word| word.iter().any(|&byte| byte != 0)));
        }
        let any = |place: usize| draws.iter().skip(place).step_by(3).any(|&set| set);
        [any(0), any(1), any(2)]
    };
    assert_eq!([drawn(true), drawn(false)], [[false, false, true], [false; 3]]);
}

/// From its file a step has the same loss and gradient, and another precision can be asked what it makes of it.
#[test]
fn a_step_is_taken_again_from_its_file() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("step.safetensors");
    for accumulate in [1, 2] {
        // A rate that changes no f32: the file has the parameters that the step met, as of one that is not finite.
        let config = TrainConfig { lr: f64::MIN_POSITIVE, accumulate, ..config() };
        let mut trainer = trainer(selfie::<f32>(1, &config), 0, &config);
        let mut metrics = trainer.step().expect("a finite step");
        for poisoned in [false, true] {
            if poisoned {
                let place = trainer.network().parameters().table.get("pool.u0").expect("its table").range.start;
                trainer.network_mut().parameters_mut().master[place] = f32::NAN;
                metrics = trainer.step().expect("the first that is not finite");
            }
            trainer.write_step(&path, &model(), None).expect("a writable folder");
            let replay = Replay::<f32>::read(&path).expect("our own");
            assert_eq!((replay.about.step, replay.about.keys.len()), (metrics.step, 4));
            let found = replay.run(&mut selfie::<f32>(2, &config)).expect("the same network");
            assert_eq!(found.loss.loss.to_bits(), metrics.loss.to_bits());
            assert_eq!((found.gradient_norm.to_bits(), found.finite), (metrics.gradient_norm.to_bits(), !poisoned));
            let of = |name: &str| found.tensors.iter().find(|tensor| tensor.name == name).expect("its table");
            assert_eq!((of("pool.u0").not_finite, of("stem.conv.weight").not_finite), (usize::from(poisoned), 0));
            assert_eq!(of("stem.conv.weight").gradient_not_finite > 0, poisoned);
            let in_bf16 = replay.run(&mut selfie::<bf16>(1, &config)).expect("the same network");
            assert!(poisoned || (in_bf16.loss.loss - metrics.loss).abs() < 0.1 * metrics.loss, "{in_bf16:?}");
        }
        let other = Classifier::<Cpu, f32>::new(
            cpu(1),
            Build { config: &model(), batch: config.micro_batch(), purpose: purpose(&config), seed: 0 },
            3,
        );
        let replay = Replay::<f32>::read(&path).expect("our own");
        let error = replay.run(&mut other.expect("sound")).expect_err("another network");
        assert!(matches!(error, Error::OtherNetwork { .. }), "{error}");
    }
}

/// Every cut of a step's file, and a bit of every eighth byte of its header, is refused or harmless: never a panic.
#[test]
fn damaged_files_of_steps_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("step.safetensors");
    let mut trainer = trainer(selfie::<f32>(1, &config()), 0, &config());
    trainer.step().expect("a finite step");
    trainer.write_step(&path, &model(), None).expect("a writable folder");
    let sound = std::fs::read(&path).expect("written");
    let header = 8 + u64::from_le_bytes(sound[..8].try_into().expect("8 bytes")) as usize;
    for cut in (0..header).step_by(61).chain([sound.len() - 1]) {
        std::fs::write(&path, &sound[..cut]).expect("writable");
        assert_eq!(Replay::<f32>::read(&path).expect_err("cut").kind(), ErrorKind::Input, "{cut} bytes");
    }
    for byte in (0..header).step_by(8) {
        let mut bytes = sound.clone();
        bytes[byte] ^= 1 << (byte % 7);
        std::fs::write(&path, &bytes).expect("writable");
        if let Ok(replay) = Replay::<f32>::read(&path) {
            let _ = replay.run(&mut selfie::<f32>(1, &config()));
        }
    }
}

/// One image over and over: every micro-batch has the statistics and the gradient of the whole batch, so the mean over
/// them is the batch's. To the tolerance of a whole step in f64, as in the parity tests.
#[test]
fn gradients_of_micro_batches_are_averaged() {
    let norm = |accumulate| {
        let config = TrainConfig { accumulate, augment: false, ..config() };
        let one = Images { items: vec![5], ..images(Split::Train, 0) };
        let mut trainer = Trainer::new(classifier::<f64>(1, &config), one, &config, None).expect("it fits");
        let metrics = trainer.step().expect("a finite step");
        [metrics.gradient_norm, metrics.loss]
    };
    for (parts, whole) in norm(2).into_iter().zip(norm(1)) {
        assert!((parts - whole).abs() <= 1e-9 * whole, "{parts} {whole}");
    }
}

/// Images of which one cannot be read.
struct Damaged {
    sound: Arc<dyn Dataset>,
    index: usize,
    asked: AtomicBool,
}

impl Dataset for Damaged {
    fn len(&self) -> usize {
        self.sound.len()
    }
    fn describe(&self) -> String {
        self.sound.describe()
    }
    fn classes(&self) -> &[String] {
        self.sound.classes()
    }
    fn label(&self, index: usize) -> Option<u32> {
        self.sound.label(index)
    }
    fn geometry(&self) -> Geometry {
        self.sound.geometry()
    }
    fn key(&self, index: usize) -> String {
        self.sound.key(index)
    }
    fn read(&self, index: usize) -> selfie_data::Result<Image> {
        if index == self.index {
            self.asked.store(true, Ordering::Relaxed);
            return Err(selfie_data::Error::Worker { message: "damaged".into() });
        }
        self.sound.read(index)
    }
    fn read_into(&self, index: usize, pixels: &mut [u8]) -> selfie_data::Result<()> {
        pixels.copy_from_slice(&self.read(index)?.pixels);
        Ok(())
    }
}

/// A batch is fetched while the step before it runs; what is wrong with it is not that step's.
#[test]
fn a_bad_image_belongs_to_the_step_that_meets_it() {
    let indices = &batch_of(3, &config())["batch.indices"];
    let index = u64::from_le_bytes(indices[..8].try_into().expect("8 bytes")) as usize;
    let damaged = |config: &TrainConfig, max_bad| {
        let sound = images(Split::Train, 0);
        let dataset = Arc::new(Damaged { sound: sound.dataset.clone(), index, asked: AtomicBool::new(false) });
        let images = Images { dataset: dataset.clone(), max_bad, ..sound };
        let mut trainer = Trainer::new(selfie::<f32>(1, config), images, config, None).expect("it fits");
        for _ in 0..2 {
            trainer.step().expect("a finite step");
            assert!(trainer.bad_files().is_empty());
        }
        (trainer, dataset)
    };
    let (mut trainer, dataset) = damaged(&config(), DEFAULT_MAX_BAD);
    assert!(dataset.asked.load(Ordering::Relaxed), "the third batch was fetched during the second step");
    trainer.step().expect("one may be bad");
    assert_eq!(trainer.bad_files().iter().map(|file| file.index).collect::<Vec<_>>(), [index]);

    let (mut trainer, _) = damaged(&config(), 0.0);
    assert_eq!(trainer.step().expect_err("none may be bad").kind(), ErrorKind::Input);
    assert_eq!(trainer.progress().step, 2);

    let (trainer, dataset) = damaged(&TrainConfig { steps: Some(2), ..config() }, 0.0);
    assert!(trainer.is_over() && !dataset.asked.load(Ordering::Relaxed), "nothing is fetched beyond the end");
}

#[test]
fn seeds_differ() {
    let other = TrainConfig { seed: 12, ..config() };
    let run = |config: &TrainConfig| {
        let mut trainer = trainer(selfie::<f32>(1, config), 0, config);
        trainer.step().expect("a finite step");
        bits(trainer.network())
    };
    assert_eq!(run(&config()), run(&config()));
    assert_ne!(run(&config()), run(&other));
}

#[test]
fn the_loss_falls() {
    let config = TrainConfig { steps: Some(60), batch: 11, ..config() };
    let mut trainer = trainer(classifier::<f32>(2, &config), 1, &config);
    let losses: Vec<f64> = (0..60).map(|_| trainer.step().expect("a finite step").loss).collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&losses[50..]) < 0.8 * mean(&losses[..10]), "{losses:?}");
    assert!(trainer.is_over() && trainer.fraction() == 1.0);
}

#[test]
fn metrics_say_where_training_is() {
    let config = TrainConfig { augment: false, ..config() };
    let mut trainer = trainer(selfie::<f32>(1, &config), 0, &config);
    let metrics = trainer.step().expect("a finite step");
    assert_eq!((metrics.step, metrics.epoch), (1, 4.0 / 22.0));
    assert_eq!(metrics.learning_rate, 0.05);
    assert!(metrics.gradient_norm > 0.0 && metrics.images_per_second() > 0.0);
    assert!((0.0..=metrics.seconds).contains(&metrics.data_wait_seconds));
    assert_eq!(trainer.progress().step, 1);
}

/// A parameter that is NaN makes every step bad: none is applied, and the third ends training.
#[test]
fn bad_steps_change_nothing_and_the_third_ends_it() {
    let config = config();
    let mut trainer = trainer(selfie::<f32>(1, &config), 0, &config);
    trainer.step().expect("a finite step");
    let u0 = trainer.network().parameters().table.get("pool.u0").expect("the first token").range.start;
    trainer.network_mut().parameters_mut().master[u0] = f32::NAN;
    trainer.network_mut().refresh_copy().expect("host memory");
    let before = bits(trainer.network());
    for skipped in 1..=2 {
        let metrics = trainer.step().expect("not yet");
        assert!(!metrics.finite && !metrics.loss.is_finite());
        assert_eq!((trainer.progress().skipped, trainer.progress().step), (skipped, 1 + skipped));
    }
    let error = trainer.step().expect_err("the third in a row");
    assert_eq!(error.kind(), ErrorKind::Diverged);
    assert!(error.to_string().contains("step 4"), "{error}");
    assert_eq!(bits(trainer.network()), before);

    // A good step in between starts the count again.
    trainer.network_mut().parameters_mut().master[u0] = 0.0;
    trainer.network_mut().refresh_copy().expect("host memory");
    assert!(trainer.step().expect("finite again").finite);
    assert_eq!((trainer.progress().skipped, trainer.progress().skipped_in_a_row), (3, 0));
}

#[test]
fn evaluation_counts_every_image_once() {
    let config = config();
    let mut network = classifier::<f32>(1, &config);
    let held_out = images(Split::Test, 1);
    let evaluation = evaluate(&mut network, &held_out).expect("sound images");
    let mut seen = Vec::new();
    let classification = classify(&mut network, &held_out, |index, scores| seen.push((index, scores.len())));
    let classification = classification.expect("sound images");
    // 7 images in batches of 4: the last one is padded.
    assert_eq!((evaluation.n, classification.n), (7, 7));
    assert!(seen.iter().copied().eq((0..7).map(|index| (index, 3))));
    assert_eq!(classification.confusion.iter().flatten().sum::<u64>(), 7);
    for (class, row) in classification.confusion.iter().enumerate() {
        let images = (0..7).filter(|&index| held_out.dataset.label(index) == Some(class as u32)).count();
        assert_eq!(row.iter().sum::<u64>(), images as u64);
    }
    // Means of the same numbers, once in f32 batch by batch and once in f64: a few roundings of a loss of about 1.
    assert!((evaluation.loss - classification.loss).abs() <= 16.0 * f64::from(f32::EPSILON) * evaluation.loss);
    assert!((evaluation.accuracy - classification.top1).abs() <= 4.0 * f64::from(f32::EPSILON));
    assert_eq!(classification.top5, 1.0);

    let none = Images { items: Vec::new(), ..held_out };
    assert_eq!(evaluate(&mut network, &none).err().map(|error| error.kind()), Some(ErrorKind::Usage));
}

/// One by one and in batches of 4: the same masks, the same statistics.
#[test]
fn evaluation_does_not_depend_on_the_batch() {
    let [four, one] = [4, 1].map(|batch| TrainConfig { batch, ..config() });
    let held_out = images(Split::Test, 0);
    let run = |config: &TrainConfig| evaluate(&mut selfie::<f64>(1, config), &held_out).expect("sound images");
    let (four, one) = (run(&four), run(&one));
    // Sums of 28 losses of about 10, in f64 in another order.
    assert!((four.loss - one.loss).abs() <= 100.0 * f64::EPSILON * four.loss, "{four:?} {one:?}");
    assert!((four.accuracy - one.accuracy).abs() <= 100.0 * f64::EPSILON, "{four:?} {one:?}");
}

#[test]
fn a_checkpoint_of_another_network_names_both() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = CheckpointStore::new(folder.path(), 1);
    let config = config();
    trainer(classifier::<f32>(1, &config), 0, &config).save(&store, &json!({})).expect("a writable folder");
    let newest = store.newest().expect("sound").expect("one was saved");
    let wide = ModelConfig { stem_width: 8, ..model() };
    let build = Build { config: &wide, batch: 4, purpose: Purpose::Train, seed: 11 };
    let network = Classifier::<Cpu, f32>::new(cpu(1), build, 3).expect("sound");
    let error = Trainer::new(network, images(Split::Train, 0), &config, Some(&newest.checkpoint)).err();
    let error = error.expect("the stem has 4 and 8 channels");
    assert_eq!(error.kind(), ErrorKind::Input);
    let text = error.to_string();
    for part in ["weights.safetensors", "stem.conv.weight", "[8, 3, 3, 3]", "[4, 3, 3, 3]"] {
        assert!(text.contains(part), "{part} in {text}");
    }

    let seed = TrainConfig { seed: 5, ..config };
    let error = Trainer::new(classifier::<f32>(1, &seed), images(Split::Train, 0), &seed, Some(&newest.checkpoint));
    assert!(matches!(error.err(), Some(Error::Usage { key, .. }) if key == "train.seed"));
}

#[test]
fn the_networks_batch_must_be_the_configurations() {
    let error = Trainer::new(selfie::<f32>(1, &config()), images(Split::Train, 0), &TrainConfig::default(), None);
    assert_eq!(error.err().map(|error| error.kind()), Some(ErrorKind::Usage));
}

#[test]
fn a_checkpoint_of_f32_continues_in_f64() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = CheckpointStore::new(folder.path(), 1);
    let config = config();
    let mut narrow = trainer(selfie::<f32>(1, &config), 0, &config);
    narrow.step().expect("a finite step");
    narrow.save(&store, &json!({})).expect("a writable folder");
    let newest = store.newest().expect("sound").expect("one was saved");
    let wide = selfie::<f64>(1, &config);
    let wide = Trainer::new(wide, images(Split::Train, 0), &config, Some(&newest.checkpoint)).expect("it fits");
    let master = |trainer: &[f32]| trainer.iter().map(|value| value.to_f64()).collect::<Vec<_>>();
    assert_eq!(wide.network().parameters().master, master(&narrow.network().parameters().master));
}
