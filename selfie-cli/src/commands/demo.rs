//! `demo`: the whole method on a made-up world, by the clock.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use selfie_kernels::{Backend, Cpu, Element};
use selfie_model::durable;
use selfie_model::{Begin, Evaluation, Inputs, Mode, Network, Selfie, Trainer, evaluation_order};

use super::begin::{Beginning, Outcome};
use super::{finetune, pretrain};
use crate::args::Demo;
use crate::config::{Key, Request, Task};
use crate::device;
use crate::exit::{Exit, Problem};
use crate::halfblocks::Colours;
use crate::progress::{Reporter, Voice, duration};
use crate::puzzle::Puzzle;
use crate::run_folder::Lock;
use crate::shell;
use crate::signals::Signals;
use crate::system::System;

/// Marks a folder as a demo's, which the next demo may replace.
const MARK: &str = "demo.json";
const DATA: &str = "synthetic:";
/// Labelled images of each class, and of all ten.
const LABELS_PER_CLASS: usize = 10;
const LABELS: usize = 10 * LABELS_PER_CLASS;
/// Part of the time for pretraining.
const PRETRAINING: f64 = 0.5;
/// Images of a step of pretraining.
const BATCH: usize = 64;
/// Puzzles shown.
const PUZZLES: u32 = 6;
/// Seeds of finetuning, where the time allows.
const SEEDS: u64 = 3;
/// Steps of finetuning below which a seed is given up for longer ones.
const ENOUGH_STEPS: u64 = 120;
/// Batch and learning rate of finetuning: of 16 and 32, 0.02 to 0.1, what is best for starting from scratch, after 180
/// steps on 100 labels (2 seeds); pretrained weights would like 0.1 better.
const FINETUNING: (usize, f64) = (16, 0.05);

/// Runs the command.
///
/// # Errors
/// A folder that is not a demo's; what the system refuses.
pub fn run(arguments: &Demo) -> anyhow::Result<Exit> {
    let clock = Clock { began: Instant::now(), all: Duration::from_secs(arguments.seconds) };
    let reporter = Reporter::new(Voice::Full);
    let _lock = prepare(&arguments.out)?;
    let signals = Signals::install()?;
    let version = env!("CARGO_PKG_VERSION");
    reporter.say(format!("selfie {version}, a demonstration in {}", duration(clock.all.as_secs_f64())));
    reporter.say(format!("machine   {}", System::here().cpu));
    reporter.say("needs     no data, no GPU, no network");
    reporter.say(format!("writes    {}", arguments.out.display()));

    reporter.say("\n1. Pretraining without labels: which hidden patch belongs at which hidden place?\n");
    let Some(pretrained) = pretrain(arguments, &clock, &signals)? else { return Ok(Exit::Stopped) };

    let (seeds, steps) = plan(clock.left().as_secs_f64(), pretrained.rate, pretrained.evaluation.n);
    reporter.say(format!(
        "\n2. Finetuning on {LABELS} labelled images, {steps} steps each: from the pretrained weights and from scratch\n"
    ));
    let mut pairs: Vec<[f64; 2]> = Vec::new();
    let mut pair_took = Duration::ZERO;
    for seed in 0..seeds {
        if seed > 0 && pair_took > clock.left() {
            break;
        }
        let began = Instant::now();
        let mut pair = [0.0; 2];
        for (accuracy, start) in pair.iter_mut().zip([Start::Pretrained, Start::Scratch]) {
            match finetune(arguments, start, seed, steps, &signals)? {
                Some(found) => *accuracy = found,
                None => return Ok(Exit::Stopped),
            }
        }
        let [ours, scratch] = pair.map(|accuracy| 100.0 * accuracy);
        reporter.say(format!("seed {seed}: test accuracy {ours:.1}% pretrained, {scratch:.1}% from scratch"));
        pairs.push(pair);
        pair_took = began.elapsed();
    }

    reporter.say("\n3. Result\n");
    let Pretrained { evaluation, chance, .. } = pretrained;
    reporter.say(format!(
        "puzzle      {:.1}% right on {} held-out images, {:.1} x chance ({:.0}%)",
        100.0 * evaluation.accuracy,
        evaluation.n,
        evaluation.accuracy / chance,
        100.0 * chance
    ));
    comparison(&pairs).iter().for_each(|line| reporter.say(line));
    reporter.say(format!("took        {}", duration(clock.began.elapsed().as_secs_f64())));
    reporter.say(format!("\nlook closer         selfie inspect {}", shell::path(arguments.out.join("pretrain"))));
    reporter.say("on your own images  selfie pretrain --data FOLDER --out runs/pre");
    Ok(Exit::Done)
}

/// What pretraining gave.
struct Pretrained {
    evaluation: Evaluation,
    /// Accuracy of guessing.
    chance: f64,
    /// Images a second, in training.
    rate: f64,
}

/// Pretrains by the clock; none when a signal stopped it.
fn pretrain(arguments: &Demo, clock: &Clock, signals: &Signals) -> anyhow::Result<Option<Pretrained>> {
    let time = clock.all.mul_f64(PRETRAINING);
    let request = request(
        arguments,
        "pretrain",
        &[
            ("train.minutes", (time.as_secs_f64() / 60.0).to_string()),
            ("train.batch", BATCH.to_string()),
            ("train.seed", arguments.seed.to_string()),
            ("train.eval_every", "0".into()),
        ],
    )?;
    let mut begin = Beginning::new(Task::Pretrain, &request, signals.clone(), Voice::Full)?;
    let device = device::cpu(arguments.threads)?;
    let chance = 1.0 / begin.model.hidden_patches() as f64;
    let mut show = Show::new(&begin, time)?;
    let (mut images, mut seconds) = (0.0, 0.0);
    let outcome = pretrain::pretrain::<Cpu, f32>(device, &mut begin, &mut |trainer, step, reporter| {
        images += step.images as f64;
        seconds += step.seconds;
        show.after_step(trainer, reporter)
    })?;
    match outcome {
        Outcome::Done(Some(evaluation)) => Ok(Some(Pretrained { evaluation, chance, rate: images / seconds })),
        Outcome::Stopped => Ok(None),
        Outcome::Done(None) | Outcome::AlreadyFinished => anyhow::bail!("pretraining ended without a measurement"),
    }
}

/// Where finetuning starts.
#[derive(Clone, Copy)]
enum Start {
    Pretrained,
    Scratch,
}

/// Finetunes; gives the test accuracy, none when a signal stopped it.
fn finetune(arguments: &Demo, start: Start, seed: u64, steps: u64, signals: &Signals) -> anyhow::Result<Option<f64>> {
    let (name, init) = match start {
        Start::Pretrained => ("pretrained", arguments.out.join("pretrain").to_string_lossy().into_owned()),
        Start::Scratch => ("scratch", "scratch".into()),
    };
    let request = request(
        arguments,
        &format!("{name}-{seed}"),
        &[
            ("train.init", init),
            ("train.steps", steps.to_string()),
            ("train.batch", FINETUNING.0.to_string()),
            ("train.lr", FINETUNING.1.to_string()),
            ("train.seed", (arguments.seed + seed).to_string()),
            ("data.labels", format!("{LABELS_PER_CLASS}@{}", arguments.seed)),
        ],
    )?;
    let mut begin = Beginning::new(Task::Finetune, &request, signals.clone(), Voice::Log)?;
    let device = device::cpu(arguments.threads)?;
    match finetune::finetune::<Cpu, f32>(device, &mut begin)? {
        Outcome::Done(Some(found)) => Ok(Some(found.top1)),
        Outcome::Stopped => Ok(None),
        Outcome::Done(None) | Outcome::AlreadyFinished => anyhow::bail!("finetuning ended without a test accuracy"),
    }
}

/// How many seeds, and steps for each of their two finetunings, fit into `left` seconds at `rate` training images a
/// second. A classifier's image costs about what one of the puzzle's costs, a tested one a third of it.
fn plan(left: f64, rate: f64, test_images: usize) -> (u64, u64) {
    // Something is left for small batches, which are slower, and for a machine that is busy now and then.
    let images = 0.7 * left * rate;
    let steps = |seeds: u64| {
        let training = images / (2 * seeds) as f64 - test_images as f64 / 3.0;
        (training / FINETUNING.0 as f64).clamp(40.0, 300.0) as u64
    };
    let seeds = (1..=SEEDS).rev().find(|&seeds| steps(seeds) >= ENOUGH_STEPS).unwrap_or(1);
    (seeds, steps(seeds))
}

/// Time, from the start.
struct Clock {
    began: Instant,
    all: Duration,
}

impl Clock {
    fn left(&self) -> Duration {
        self.all.saturating_sub(self.began.elapsed())
    }
}

/// A configuration of the demonstration's; nothing from the environment.
fn request(arguments: &Demo, run: &str, values: &[(&str, String)]) -> anyhow::Result<Request> {
    let out = arguments.out.join(run);
    let common = [
        ("data.path", DATA.to_string()),
        ("model.preset", "tiny".into()),
        ("train.save_every", "0".into()),
        ("run.out", out.to_string_lossy().into_owned()),
        // So small a network is no work for a GPU.
        ("run.device", "cpu".into()),
        ("run.threads", arguments.threads.to_string()),
    ];
    let flags = common.iter().chain(values).map(|(name, value)| {
        let key = Key::find(name).with_context(|| format!("{name} is no key"))?;
        Ok((key, value.clone()))
    });
    Ok(Request { flags: flags.collect::<anyhow::Result<_>>()?, ..Request::default() })
}

/// Takes the folder, and clears away an earlier demo's runs.
fn prepare(out: &Path) -> anyhow::Result<Lock> {
    let mark = out.join(MARK);
    let empty = fs::read_dir(out).map_or(true, |mut entries| entries.next().is_none());
    if !empty && !mark.is_file() {
        return Err(Problem::usage(format!(
            "--out {} is not empty and no earlier demo's: give another folder",
            out.display()
        )));
    }
    let refused = || format!("cannot write to {}", out.display());
    durable::create_folder(out)?;
    durable::write_file(&mark, b"{\"made_by\": \"selfie demo\"}\n")?;
    let lock = Lock::take(out)?;
    for entry in fs::read_dir(out).with_context(refused)? {
        let entry = entry.with_context(refused)?;
        if entry.path().join("config.toml").is_file() {
            fs::remove_dir_all(entry.path()).with_context(refused)?;
        }
    }
    Ok(lock)
}

/// What the comparison says, whatever it is.
fn comparison(pairs: &[[f64; 2]]) -> Vec<String> {
    let n = pairs.len() as f64;
    let mean = |values: &dyn Fn(&[f64; 2]) -> f64| pairs.iter().map(values).sum::<f64>() / n;
    // The standard deviation of a sample.
    let deviation = |values: &dyn Fn(&[f64; 2]) -> f64| {
        let mean = mean(values);
        (pairs.iter().map(|pair| (values(pair) - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt()
    };
    let say = |values: &dyn Fn(&[f64; 2]) -> f64| match pairs.len() {
        1 => format!("{:.1}%", 100.0 * mean(values)),
        _ => format!("{:.1} ± {:.1}%", 100.0 * mean(values), 100.0 * deviation(values)),
    };
    let difference = |pair: &[f64; 2]| pair[0] - pair[1];
    let gain = 100.0 * mean(&difference);
    let better = pairs.iter().filter(|pair| difference(pair) > 0.0).count();
    let worse = pairs.iter().filter(|pair| difference(pair) < 0.0).count();
    let verdict = match pairs.len() {
        1 => "one seed only, so the spread is unknown",
        n if better == n => "pretraining was better with every seed",
        n if worse == n => "pretraining was worse with every seed",
        _ => "the seeds disagree: no clear difference",
    };
    vec![
        format!("pretrained  {} test accuracy with {LABELS} labels (n = {})", say(&|pair| pair[0]), pairs.len()),
        format!("scratch     {}", say(&|pair| pair[1])),
        format!("difference  {gain:+.1} points ({verdict})"),
    ]
}

/// Shows a puzzle now and then.
struct Show {
    colours: Colours,
    every: Duration,
    last: Instant,
    shown: usize,
    /// A batch of held-out images, with their orders.
    images: Vec<u8>,
    orders: Vec<u32>,
    side: usize,
    patch: usize,
    hidden: usize,
}

impl Show {
    fn new(begin: &Beginning, time: Duration) -> anyhow::Result<Self> {
        let model = &begin.model;
        let (mut images, mut orders) = (Vec::new(), Vec::new());
        if let Some(held_out) = &begin.parts.held_out {
            for &index in held_out.items.iter().cycle().take(BATCH) {
                images.extend(held_out.dataset.read(index)?.pixels);
                evaluation_order(index as u64, model.patches(), &mut orders);
            }
        }
        Ok(Self {
            colours: if begin.reporter.is_terminal() { Colours::of_terminal() } else { Colours::None },
            every: time / PUZZLES,
            last: Instant::now(),
            shown: 0,
            images,
            orders,
            side: model.image_size,
            patch: model.patch_side(),
            hidden: model.hidden_patches(),
        })
    }

    fn after_step<B: Backend<T>, T: Element>(
        &mut self,
        trainer: &mut Trainer<B, T, Selfie<B, T>>,
        reporter: &Reporter,
    ) -> anyhow::Result<()> {
        // The first one early, to see guessing.
        let due = if self.shown == 0 { self.every / 8 } else { self.every };
        if self.last.elapsed() < due || self.images.is_empty() {
            return Ok(());
        }
        self.last = Instant::now();
        let step = trainer.progress().step;
        let network = trainer.network_mut();
        let inputs = Inputs {
            images: &self.images,
            draws: &[0; 3 * BATCH],
            targets: &self.orders,
            first_sample: 0,
            valid: BATCH,
        };
        network.load(&inputs, Begin::Evaluation)?;
        network.forward(Mode::Evaluate)?;
        let accuracy = network.loss()?.accuracy;
        let logits = network.puzzle_logits()?;
        let image = self.shown % BATCH;
        self.shown += 1;
        let patches = self.orders.len() / BATCH;
        let hidden: Vec<usize> =
            self.orders[image * patches..][..self.hidden].iter().map(|&place| place as usize).collect();
        let rows = logits[image * self.hidden * self.hidden..].chunks(self.hidden).take(self.hidden);
        let highest = |row: &[f64]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0);
        let picks: Vec<usize> = rows.map(highest).collect();
        let size = self.side * self.side * 3;
        let puzzle = Puzzle {
            pixels: &self.images[image * size..][..size],
            side: self.side,
            patch: self.patch,
            hidden: &hidden,
            picks: &picks,
        };
        let caption = format!(
            "step {step}: {} of {} right here; {:.0}% over {BATCH} held-out images (guessing {:.0}%)",
            puzzle.right(),
            self.hidden,
            100.0 * accuracy,
            100.0 / self.hidden as f64
        );
        if self.colours == Colours::None {
            reporter.say(format!("puzzle    {caption}: {}", puzzle.words()));
            return Ok(());
        }
        reporter.show(format!("\n{}\n{caption}", puzzle.picture(self.colours).join("\n")));
        tracing::info!("{caption}: {}", puzzle.words());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{ENOUGH_STEPS, comparison, plan};

    #[test]
    fn the_plan_fits_the_time() {
        // A quiet machine of two cores, and one that is five times slower.
        for (rate, seeds, least) in [(590.0, 3, ENOUGH_STEPS), (118.0, 1, 80)] {
            let (planned, steps) = plan(42.0, rate, 1000);
            assert_eq!(planned, seeds);
            assert!(steps >= least, "{steps}");
            let seconds = (2 * planned) as f64 * (steps as f64 * 16.0 + 1000.0 / 3.0) / rate;
            assert!(seconds < 42.0, "{seconds}");
        }
        assert_eq!(plan(0.0, 590.0, 1000), (1, 40));
    }

    #[test]
    fn the_comparison_says_what_the_numbers_say() {
        let text = |pairs: &[[f64; 2]]| comparison(pairs).join("\n");
        let better = text(&[[0.5, 0.4], [0.52, 0.41], [0.51, 0.42]]);
        assert!(
            better.contains("51.0 ± 1.0%")
                && better.contains("+10.0 points")
                && better.contains("better with every seed"),
            "{better}"
        );
        let worse = text(&[[0.4, 0.5], [0.41, 0.52], [0.42, 0.51]]);
        assert!(worse.contains("-10.0 points") && worse.contains("worse with every seed"), "{worse}");
        let unclear = text(&[[0.5, 0.4], [0.4, 0.5]]);
        assert!(unclear.contains("no clear difference"), "{unclear}");
        let single = text(&[[0.5, 0.4]]);
        assert!(single.contains("n = 1") && single.contains("one seed only") && !single.contains('±'), "{single}");
    }
}
