//! `probe`: what the features of a run are worth without training the network any further.

use std::path::Path;

use selfie_model::probe::{self, DEFAULT_NEIGHBOURS, Fit, Labelled, Linear, PENALTIES, Similarity};
use selfie_model::{Encoded, Images};
use serde_json::{Value, json};

use super::begin::where_they_were;
use super::encoding::{Parameters, Trained};
use super::evaluate::Weights;
use crate::args::{ConfigFlags, ForEvaluate, Knn, LayerFlags, LinearProbe, Probe};
use crate::data::{self, Parts};
use crate::exit::{Exit, Problem};
use crate::screen;
use crate::training::Answer;

/// Runs the command.
///
/// # Errors
/// Usage, input, and what the system refuses.
pub fn run(command: &Probe) -> anyhow::Result<Exit> {
    match command {
        Probe::Knn(arguments) => knn(arguments),
        Probe::Linear(arguments) => linear(arguments),
    }
}

fn knn(arguments: &Knn) -> anyhow::Result<Exit> {
    let Knn { run, k, temperature, similarity, labels, layer, json, flags } = arguments;
    let similarity = Similarity::from(*similarity);
    let subject = Subject::open(run, flags, layer, labels, 0.0)?;
    let (reporter, images) = (&subject.trained.reporter, subject.parts.train.items.len());
    let k = match *k {
        Some(k) if k as usize > images => {
            return Err(Problem::usage(format!("-k {k}: there are only {images} training images; lower -k")));
        }
        Some(k) => k as usize,
        None => DEFAULT_NEIGHBOURS.min(images),
    };
    if k < DEFAULT_NEIGHBOURS && arguments.k.is_none() {
        reporter.warn(format!("k = {k} instead of {DEFAULT_NEIGHBOURS}, as there are {images} training images"));
    }
    let predict = |parameters| {
        let [train, _, test] = subject.encode(parameters)?;
        // Bad images may have left fewer.
        let k = k.min(train.labels.len());
        let knn = probe::Knn { k, temperature: *temperature, classes: subject.classes().len(), similarity };
        let predicted = knn.predict(train.labelled(), &test.features, subject.threads())?;
        Ok(Predicted { predicted, labels: test.labels, width: train.width, images: train.labels.len() })
    };
    let [trained, untrained] = both(predict)?;
    let k = k.min(trained.images);
    let similarity = match similarity {
        Similarity::Whitened => "cosine of whitened features",
        Similarity::Cosine => "cosine",
    };
    let settings = json!({ "k": k, "temperature": temperature, "similarity": similarity });
    let words = format!("k = {k}, similarity {similarity}, temperature {temperature}");
    let answer = if *json { Answer::Json } else { Answer::Words };
    Report { probe: "knn", subject: &subject, trained, untrained, settings, words }.print(answer)
}

fn linear(arguments: &LinearProbe) -> anyhow::Result<Exit> {
    let LinearProbe { run, labels, validation, layer, json, flags } = arguments;
    let subject = Subject::open(run, flags, layer, labels, *validation)?;
    if subject.parts.held_out.is_none() {
        return Err(Problem::usage(format!(
            "--validation {validation}: there are {} training images, of which this leaves none to choose the penalty by; \
             raise --validation or --labels",
            subject.parts.train.items.len()
        )));
    }
    let classes = subject.classes().len();
    let predict = |parameters| {
        let [train, held_out, test] = subject.encode(parameters)?;
        let tried = Linear::fit(train.labelled(), classes, &PENALTIES, subject.threads())?;
        let mut chosen = (0, f64::NEG_INFINITY);
        for (place, fit) in tried.iter().enumerate() {
            let (share, _) = probe::accuracy(&fit.classifier.predict(&held_out.features), &held_out.labels);
            // Of equals the greater penalty.
            if share > chosen.1 {
                chosen = (place, share);
            }
        }
        let all = train.with(held_out);
        let path = Linear::fit(all.labelled(), classes, &PENALTIES[..=chosen.0], subject.threads())?;
        let fit = path.into_iter().next_back().expect("a fit for each penalty, the chosen one last");
        let predicted = fit.classifier.predict(&test.features);
        let predicted = Predicted { predicted, labels: test.labels, width: all.width, images: all.labels.len() };
        Ok((predicted, Chosen { fit, validation_accuracy: chosen.1 }))
    };
    let [(trained, fit), (untrained, untrained_fit)] = both(predict)?;
    for (Chosen { fit, .. }, whose) in [(&fit, "trained"), (&untrained_fit, "untrained")] {
        if !fit.has_converged() {
            subject.trained.reporter.warn(format!(
                "the classifier on the {whose} network's features is not at its optimum: gradient {:.1e} after {} iterations",
                fit.gradient, fit.iterations
            ));
        }
    }
    let settings = json!({
        "classifier": "multinomial logistic regression",
        "features": "standardised",
        "penalties": PENALTIES,
        "validation": validation,
        "fit": fit.as_json(),
        "untrained_fit": untrained_fit.as_json(),
    });
    let words = format!(
        "logistic regression on standardised features; penalty {:e} (untrained {:e}) of {PENALTIES:?} by {:.0}% of the \
         training images; gradient {:.0e} after {} iterations",
        fit.fit.penalty,
        untrained_fit.fit.penalty,
        100.0 * validation,
        fit.fit.gradient,
        fit.fit.iterations
    );
    let answer = if *json { Answer::Json } else { Answer::Words };
    Report { probe: "linear", subject: &subject, trained, untrained, settings, words }.print(answer)
}

/// A classifier, with what chose its penalty.
struct Chosen {
    fit: Fit,
    validation_accuracy: f64,
}

impl Chosen {
    fn as_json(&self) -> Value {
        json!({
            "penalty": self.fit.penalty,
            "validation_accuracy": self.validation_accuracy,
            "objective": self.fit.objective,
            "gradient": self.fit.gradient,
            "iterations": self.fit.iterations,
            "converged": self.fit.has_converged(),
        })
    }
}

/// A run, and the labelled images to probe it by.
struct Subject {
    trained: Trained,
    parts: Parts,
    test: Images,
    labels: String,
}

/// The features of some images, and their labels.
#[derive(Default)]
pub struct Features {
    width: usize,
    /// `[images, width]`
    pub features: Vec<f32>,
    /// `[images]`
    pub labels: Vec<u32>,
}

impl Features {
    /// As a probe takes them.
    pub fn labelled(&self) -> Labelled<'_> {
        Labelled { features: &self.features, width: self.width, labels: &self.labels }
    }

    /// Adds one of `images`, which have labels all.
    pub fn add(&mut self, images: &Images, image: Encoded<'_>) {
        if let Some(label) = images.dataset.label(image.index) {
            self.width = image.features.len();
            self.features.extend(image.features);
            self.labels.push(label);
        }
    }

    /// Both together.
    fn with(mut self, other: Self) -> Self {
        self.features.extend(other.features);
        self.labels.extend(other.labels);
        self
    }
}

impl Subject {
    fn open(
        run: &Path,
        flags: &ConfigFlags<ForEvaluate>,
        layer: &LayerFlags,
        labels: &str,
        validation: f64,
    ) -> anyhow::Result<Self> {
        let trained = Trained::open(run, Weights::of_any_run(run)?, &flags.request)?.at(layer)?;
        let opened = data::for_probe(&trained.settings.data, labels, validation);
        let (parts, test) = opened.map_err(|error| where_they_were(error, &trained.resolved))?;
        parts.notes.iter().for_each(|note| trained.reporter.say(note));
        trained.introduce();
        Ok(Self { trained, parts, test, labels: labels.into() })
    }

    fn classes(&self) -> &[String] {
        self.parts.train.dataset.classes()
    }

    fn threads(&self) -> usize {
        self.trained.settings.run.threads
    }

    /// The features of the training, the validation and the test images; none where there is no such part.
    fn encode(&self, parameters: Parameters) -> anyhow::Result<[Features; 3]> {
        let parts = [Some(&self.parts.train), self.parts.held_out.as_ref(), Some(&self.test)];
        let there: Vec<_> = parts.iter().enumerate().filter_map(|(place, part)| Some((place, (*part)?))).collect();
        let images: Vec<_> = there.iter().map(|&(_, images)| images).collect();
        let mut found: [Features; 3] = Default::default();
        let skipped = self.trained.encode(parameters, &images, &mut |part, image| {
            let (place, images) = there[part];
            found[place].add(images, image);
        })?;
        if parameters == Parameters::Trained {
            for file in skipped.iter().flatten() {
                self.trained.reporter.warn(format!("skipped {}: {}", file.key, file.reason));
            }
        }
        Ok(found)
    }
}

/// With the run's network, and with the untrained one.
fn both<R>(mut of: impl FnMut(Parameters) -> anyhow::Result<R>) -> anyhow::Result<[R; 2]> {
    Ok([of(Parameters::Trained)?, of(Parameters::Untrained)?])
}

/// What a classifier says of the test images.
struct Predicted {
    predicted: Vec<u32>,
    /// The truth.
    labels: Vec<u32>,
    width: usize,
    /// Training images that it was made from.
    images: usize,
}

/// What a probe found.
struct Report<'a> {
    probe: &'a str,
    subject: &'a Subject,
    trained: Predicted,
    untrained: Predicted,
    settings: Value,
    /// The same for people.
    words: String,
}

impl Report<'_> {
    fn print(self, answer: Answer) -> anyhow::Result<Exit> {
        let Self { probe: name, subject, trained, untrained, settings, words } = self;
        let Predicted { predicted, labels, width, images } = trained;
        let (top1, error) = probe::accuracy(&predicted, &labels);
        let (reference, reference_error) = probe::accuracy(&untrained.predicted, &labels);
        let (gain, gain_error) = probe::gain(&predicted, &untrained.predicted, &labels);
        let (n, classes) = (labels.len(), subject.classes().len());
        let (chance, seed, layer) = (1.0 / classes as f64, subject.trained.seed(), subject.trained.layer.to_string());
        let text = match answer {
            Answer::Json => {
                let answer = json!({
                    "probe": name,
                    "top1": top1,
                    "standard_error": error,
                    "n": n,
                    "chance": chance,
                    "untrained": { "top1": reference, "standard_error": reference_error, "seed": seed },
                    "gain": gain,
                    "gain_standard_error": gain_error,
                    "layer": layer,
                    "width": width,
                    "train_images": images,
                    "labels": subject.labels,
                    "classes": classes,
                    "settings": settings,
                });
                format!("{answer:#}\n")
            }
            Answer::Words => {
                let percent = |share: f64| 100.0 * share;
                [
                    format!("{name:<9} {words}"),
                    format!("features  {width} numbers, {layer}; {images} training images (labels {})", subject.labels),
                    format!("trained   top-1 {:.2}% ± {:.2}", percent(top1), percent(error)),
                    format!(
                        "untrained top-1 {:.2}% ± {:.2}, the same network as drawn from seed {seed}",
                        percent(reference),
                        percent(reference_error)
                    ),
                    format!("gain      {:+.2} points ± {:.2}", percent(gain), percent(gain_error)),
                    format!(
                        "chance    {:.2}%; n = {n} test images; ± is the standard error over them",
                        percent(chance)
                    ),
                    String::new(),
                ]
                .join("\n")
            }
        };
        screen::print(&text)?;
        Ok(Exit::Done)
    }
}
