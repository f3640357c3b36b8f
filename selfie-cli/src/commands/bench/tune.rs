//! Which kernels are the fastest here: every variant of every pass and shape of a step is timed in that step, in turns, and the
//! table of those that beat the rules is kept for all later commands.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use selfie_kernels::cuda::Choices;
use selfie_kernels::{Backend, Call, Cuda, Element, Profile};
use selfie_model::{Classifier, Feed, Network, Selfie, Steps};
use serde_json::{Value, json};

use super::measure::{Subject, WARM_UP, median};
use super::report::significant;
use crate::args::Timed;
use crate::choices::{Place, Table};
use crate::device::{Chosen, Device, Work};
use crate::exit::Problem;
use crate::progress::Reporter;

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// Turns of each variant, and of the whole step with the table and without.
const ROUNDS: usize = 3;
/// Steps of a turn at least.
const LEAST_STEPS: usize = 3;
/// A variant must take less of the rule's time than this in the middle of all rounds, and less than all of it in each.
const WORTH_IT: f64 = 0.97;

/// Tunes the step of a network on a device that has a choice.
pub struct Tuning<'a> {
    subject: &'a Subject<'a>,
    reporter: &'a Reporter,
    chosen: &'a Chosen,
    cuda: &'a Cuda,
    place: Place,
}

/// What was found.
pub struct Tuned {
    /// Passes and shapes with more than one variant, those that take longest first.
    contests: Vec<Contest>,
    /// Seconds of a step by the rules and by the table, round by round; none where no variant beat a rule.
    steps: Vec<[f64; 2]>,
    /// Where the table lies; none where it is not worth it.
    file: Option<PathBuf>,
    /// The table, with what it had of other networks.
    table: Table,
}

/// The variants of a pass and shape, and their times.
#[derive(Clone, Debug, PartialEq)]
struct Contest {
    pass: String,
    shape: String,
    /// The rule's first.
    variants: Vec<String>,
    /// Of each round and variant: seconds of a step that all such calls took, in the middle.
    rounds: Vec<Vec<f64>>,
}

impl Contest {
    /// A variant's time over the rule's, in the middle of the rounds and at worst.
    fn ratios(&self, variant: usize) -> [f64; 2] {
        let ratios: Vec<_> = self.rounds.iter().map(|times| times[variant] / times[0]).collect();
        [median(&ratios), ratios.into_iter().fold(0.0, f64::max)]
    }

    /// The fastest variant, if it beats the rule's by more than chance does.
    fn winner(&self) -> Option<usize> {
        let beats = |&variant: &usize| {
            let [middle, worst] = self.ratios(variant);
            middle < WORTH_IT && worst < 1.0
        };
        let middle = |variant: usize| self.ratios(variant)[0];
        (1..self.variants.len()).filter(beats).min_by(|&a, &b| middle(a).total_cmp(&middle(b)))
    }

    /// Seconds of a step, in the middle of the rounds.
    fn seconds(&self, variant: usize) -> f64 {
        median(&self.rounds.iter().map(|times| times[variant]).collect::<Vec<_>>())
    }
}

/// A pass and a shape.
type Key = (&'static str, String);
/// The variants of one, and the seconds of each in some steps.
type Times = (Vec<String>, Vec<Vec<f64>>);

/// The times of one round.
#[derive(Debug, Default)]
struct Round(BTreeMap<Key, Times>);

impl Round {
    /// A step's calls.
    fn add(&mut self, calls: &[Call]) {
        let mut sums = BTreeMap::<_, f64>::new();
        for call in calls {
            if let Some(choice) = &call.choice {
                let known = self.0.entry((call.pass, choice.shape.clone()));
                let (variants, _) =
                    known.or_insert_with(|| (choice.variants.clone(), vec![Vec::new(); choice.variants.len()]));
                // Calls of one shape may lie in memory so that fewer kernels take them.
                if let Some(taken) = variants.iter().position(|variant| *variant == choice.variants[choice.taken]) {
                    *sums.entry((call.pass, choice.shape.clone(), taken)).or_default() += call.seconds();
                }
            }
        }
        for ((pass, shape, taken), seconds) in sums {
            if let Some((_, times)) = self.0.get_mut(&(pass, shape)) {
                times[taken].push(seconds);
            }
        }
    }

    /// The most variants that a pass has.
    fn variants(&self) -> usize {
        self.0.values().map(|(variants, _)| variants.len()).max().unwrap_or(1)
    }
}

/// Rounds as contests, of what every round has a time for.
fn contests(rounds: &[Round]) -> Vec<Contest> {
    let Some((first, _)) = rounds.split_first() else { return Vec::new() };
    let contest = |(key, (variants, _)): (&Key, &Times)| {
        let times = |round: &Round| -> Option<Vec<f64>> {
            let (same, times) = round.0.get(key)?;
            (same == variants).then(|| times.iter().map(|times| middle(times)).collect())
        };
        let rounds = rounds.iter().map(times).collect::<Option<Vec<_>>>()?;
        Some(Contest { pass: key.0.into(), shape: key.1.clone(), variants: variants.clone(), rounds })
    };
    let mut contests: Vec<_> = first.0.iter().filter_map(contest).collect();
    contests.sort_by(|a, b| b.seconds(0).total_cmp(&a.seconds(0)));
    contests
}

/// The median; of nothing a time that wins nothing.
fn middle(times: &[f64]) -> f64 {
    if times.is_empty() { f64::INFINITY } else { median(times) }
}

impl<'a> Tuning<'a> {
    /// Of a device that was chosen.
    ///
    /// # Errors
    /// Usage: it is a CPU. No folder for the table.
    pub fn new(subject: &'a Subject<'a>, chosen: &'a Chosen, reporter: &'a Reporter) -> anyhow::Result<Self> {
        let Device::Cuda(cuda) = &chosen.device else {
            let why = chosen.no_gpu.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
            return Err(Problem::usage(format!(
                "--tune takes a GPU, as a CPU has no kernels to choose from, and none is used here{why}"
            )));
        };
        let place = Place::of(cuda);
        place.file()?;
        Ok(Self { subject, reporter, chosen, cuda, place })
    }

    /// Measures, and writes the table if steps are faster with it.
    ///
    /// # Errors
    /// Those of the steps, and what the system refuses.
    pub fn run(self) -> anyhow::Result<Tuned> {
        let rules = Table::empty(self.place.clone());
        let known = self.chosen.table.as_ref().map(|table| table.passes.clone());
        let mut table = Table { passes: known.unwrap_or_default(), ..rules.clone() };
        // How many variants there are shows in the first steps.
        let mut look = Round::default();
        self.passes(0, Duration::ZERO)?.iter().for_each(|calls| look.add(calls));
        let variants = look.variants();
        let time = self.subject.seconds.div_f64(((variants + 2) * ROUNDS) as f64);
        let mut rounds = Vec::new();
        for round in 1..=ROUNDS {
            self.reporter.say(format!("timing {variants} variants of every pass, round {round} of {ROUNDS}"));
            let mut times = Round::default();
            for number in 0..variants {
                self.passes(number, time)?.iter().for_each(|calls| times.add(calls));
            }
            rounds.push(times);
        }
        let contests = contests(&rounds);
        enter(&mut table, &contests);
        let mut steps = Vec::new();
        if contests.iter().any(|contest| contest.winner().is_some()) {
            self.reporter.say("taking turns with the table and without");
            for _ in 0..ROUNDS {
                steps.push([self.step(&rules, time)?, self.step(&table, time)?]);
            }
        }
        let is_faster = !steps.is_empty() && {
            let [rules, table] = in_the_middle(&steps);
            table < rules
        };
        let file = if is_faster { Some(table.write()?) } else { None };
        Ok(Tuned { contests, steps, file, table })
    }

    /// The calls of some steps in which every pass takes its variant of this number.
    fn passes(&self, number: usize, time: Duration) -> anyhow::Result<Vec<Vec<Call>>> {
        let device = self.cuda.with_choices(Choices::Number(number), drop).profiled();
        Ok(self.steps(device, time)?.into_iter().map(|(_, calls)| calls).collect())
    }

    /// Seconds of a step by a table.
    fn step(&self, table: &Table, time: Duration) -> anyhow::Result<f64> {
        let steps = self.steps(table.applied(self.cuda), time)?;
        Ok(median(&steps.into_iter().map(|(seconds, _)| seconds).collect::<Vec<_>>()))
    }

    fn steps(&self, device: Cuda, time: Duration) -> anyhow::Result<Vec<(f64, Vec<Call>)>> {
        self.chosen.on(Device::Cuda(device)).run(Turn { subject: self.subject, time })
    }
}

/// A table with what was found: a shape that no variant is faster for is left to the rules, whatever was found before.
fn enter(table: &mut Table, contests: &[Contest]) {
    for contest in contests {
        let shapes = table.passes.entry(contest.pass.clone()).or_default();
        match contest.winner() {
            Some(winner) => shapes.insert(contest.shape.clone(), contest.variants[winner].clone()),
            None => shapes.remove(&contest.shape),
        };
    }
    table.passes.retain(|_, shapes| !shapes.is_empty());
}

/// Of both, each by itself.
fn in_the_middle(rounds: &[[f64; 2]]) -> [f64; 2] {
    [0, 1].map(|side| median(&rounds.iter().map(|round| round[side]).collect::<Vec<_>>()))
}

/// Some steps of the subject's network, each with its seconds and calls.
struct Turn<'a> {
    subject: &'a Subject<'a>,
    time: Duration,
}

impl Work for Turn<'_> {
    type Output = Vec<(f64, Vec<Call>)>;
    fn run<B: Backend<T>, T: Element>(self, device: B) -> anyhow::Result<Self::Output> {
        let (device, build, classes) = (Arc::new(device), self.subject.build(), self.subject.classes);
        match self.subject.task {
            Timed::Pretrain => self.steps(Selfie::<B, T>::new(device, build)?),
            Timed::Finetune | Timed::Infer => self.steps(Classifier::<B, T>::new(device, build, classes)?),
        }
    }
}

impl Turn<'_> {
    fn steps<B: Backend<T>, T: Element, N: Network<B, T>>(self, network: N) -> anyhow::Result<Vec<(f64, Vec<Call>)>> {
        let device = network.device().clone();
        let mut steps = Steps::new(network, self.subject.purpose(), Feed::Staged, self.subject.classes)?;
        let mut step = || -> anyhow::Result<_> {
            let began = Instant::now();
            steps.step()?;
            steps.finish()?;
            Ok((began.elapsed().as_secs_f64(), device.calls()?))
        };
        (0..WARM_UP).try_for_each(|_| step().map(drop))?;
        let (began, mut all) = (Instant::now(), Vec::new());
        while all.len() < LEAST_STEPS || began.elapsed() < self.time {
            all.push(step()?);
        }
        Ok(all)
    }
}

impl Tuned {
    /// For machines.
    pub fn as_json(&self) -> Value {
        let contest = |contest: &Contest| {
            let variant =
                |(number, name): (usize, &String)| json!({ "name": name, "seconds": contest.seconds(number) });
            json!({
                "pass": contest.pass,
                "shape": contest.shape,
                "variants": contest.variants.iter().enumerate().map(variant).collect::<Vec<_>>(),
                "fastest": contest.winner().map(|winner| &contest.variants[winner]),
            })
        };
        json!({
            "place": self.table.measured,
            "contests": self.contests.iter().map(contest).collect::<Vec<_>>(),
            "step_seconds": self.steps.iter().map(|[rules, table]| json!({ "rules": rules, "table": table })).collect::<Vec<_>>(),
            "entries": self.table.len(),
            "file": self.file,
        })
    }

    /// For people.
    pub fn as_text(&self) -> String {
        let mut text = String::new();
        let ms = |seconds: f64| significant(1e3 * seconds);
        let percent = |ratio: f64| format!("{:+.1}%", 100.0 * (ratio - 1.0));
        for contest in &self.contests {
            let Some(winner) = contest.winner() else { continue };
            let Contest { pass, shape, variants, .. } = contest;
            let times = [contest.seconds(0), contest.seconds(winner)];
            writeln!(text, "{pass}, {shape}").expect(INFALLIBLE);
            let [rule, fastest] = times.map(ms);
            let gain = percent(contest.ratios(winner)[0]);
            writeln!(text, "  {rule:>7} ms  {}\n  {fastest:>7} ms  {} ({gain})", variants[0], variants[winner])
                .expect(INFALLIBLE);
        }
        let all = self.contests.len();
        let won = self.contests.iter().filter(|contest| contest.winner().is_some()).count();
        writeln!(text, "of {all} passes and shapes with a choice {won} are faster by another kernel than the rule's")
            .expect(INFALLIBLE);
        if !self.steps.is_empty() {
            let [rules, table] = in_the_middle(&self.steps);
            writeln!(
                text,
                "step      {} ms by the rules, {} ms by the table ({}); in turns: {}",
                ms(rules),
                ms(table),
                percent(table / rules),
                self.steps.iter().map(|[rules, table]| percent(table / rules)).collect::<Vec<_>>().join(", ")
            )
            .expect(INFALLIBLE);
        }
        match &self.file {
            Some(file) => {
                let count = self.table.len();
                writeln!(text, "table     {}, {count} entries, used from now on", file.display())
            }
            None => writeln!(text, "table     none is written: steps are as fast by the rules"),
        }
        .expect(INFALLIBLE);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use selfie_kernels::{Choice, Cost};

    fn contest(rounds: &[&[f64]]) -> Contest {
        Contest {
            pass: "gemm_forward".into(),
            shape: "bf16 4 x 2->3".into(),
            variants: rounds[0].iter().enumerate().map(|(number, _)| format!("v{number}")).collect(),
            rounds: rounds.iter().map(|times| times.to_vec()).collect(),
        }
    }

    #[test]
    fn the_fastest_wins_if_it_is_so_in_every_round() {
        assert_eq!(contest(&[&[1.0, 0.8, 0.9], &[1.1, 0.9, 0.9], &[1.0, 0.7, 0.9]]).winner(), Some(1));
        assert_eq!(contest(&[&[1.0, 0.98], &[1.0, 0.98], &[1.0, 0.98]]).winner(), None, "within the noise");
        // Once slower than the rule's: the other one is sure.
        assert_eq!(contest(&[&[1.0, 0.5, 0.9], &[1.0, 1.01, 0.9], &[1.0, 0.5, 0.9]]).winner(), Some(2));
        // A machine that slows down from round to round slows both.
        assert_eq!(contest(&[&[1.0, 0.9], &[2.0, 1.8], &[4.0, 3.6]]).winner(), Some(1));
        assert_eq!(contest(&[&[1.0, f64::INFINITY][..]; 3]).winner(), None, "never timed");
        assert_eq!(contest(&[&[1.0][..]; 3]).winner(), None);
    }

    fn call(pass: &'static str, shape: &str, taken: usize, seconds: f64) -> Call {
        let variants = ["rule", "other"].map(String::from).to_vec();
        let cost = Cost { shape: "4 x 2->3".into(), flops: 0, bytes: 0 };
        let choice = Some(Choice { shape: shape.into(), variants, taken });
        Call { pass, cost, choice, begin: 1.0, end: 1.0 + seconds }
    }

    #[test]
    fn calls_of_a_shape_are_summed_over_a_step_and_steps_are_not() {
        let mut round = Round::default();
        for seconds in [1.0, 8.0, 2.0] {
            let mut plain = call("a", "x", 0, 64.0);
            plain.choice = None;
            round.add(&[call("a", "x", 0, seconds), call("a", "y", 0, 4.0), plain, call("a", "x", 0, seconds)]);
        }
        round.add(&[call("a", "x", 1, 0.5), call("a", "y", 1, 16.0)]);
        assert_eq!(round.variants(), 2);
        let found = contests(&[round]);
        let found: Vec<_> = found.iter().map(|contest| (contest.shape.as_str(), &contest.rounds[0][..])).collect();
        assert_eq!(found, [("x", &[4.0, 0.5][..]), ("y", &[4.0, 16.0])]);
    }

    #[test]
    fn entries_of_other_shapes_stay_and_those_that_lost_go() {
        let place = Place { gpu: "G".into(), driver: "D".into(), selfie: "S".into() };
        let mut table = Table::empty(place);
        let won = contest(&[&[1.0, 0.5][..]; 3]);
        let other = Contest { shape: "bf16 8 x 2->3".into(), ..won.clone() };
        enter(&mut table, &[won.clone(), other.clone()]);
        assert_eq!(table.passes["gemm_forward"]["bf16 4 x 2->3"], "v1");
        assert_eq!(table.len(), 2);
        enter(&mut table, &[Contest { rounds: vec![vec![1.0, 1.0]; 3], ..won }]);
        assert_eq!(table.passes["gemm_forward"].keys().collect::<Vec<_>>(), [&other.shape]);
        enter(&mut table, &[Contest { rounds: vec![vec![1.0, 1.0]; 3], ..other }]);
        assert!(table.passes.is_empty());
    }
}
