//! Help, configuration and its errors, as a user meets them.

use crate::support::{fails, ran, selfie, text, works, write};
use serde_json::Value;

#[test]
fn help_teaches() {
    let all = works("--help").out;
    for command in [
        "demo",
        "pretrain",
        "finetune",
        "fewlabel",
        "evaluate",
        "embed",
        "neighbors",
        "map",
        "export",
        "inspect",
        "bench",
        "data",
        "config",
    ] {
        assert!(all.contains(command), "{all}");
    }
    for (command, flags) in [
        (
            "pretrain",
            "--data --out --preset --steps --epochs --minutes --batch --accumulate --lr --seed --image-size --limit \
             --workers --threads --device --precision --save-every --eval-every --log-every --set --config --json",
        ),
        ("finetune", "--data --out --init --labels --reuse-patch-norm --validation --json"),
        ("fewlabel", "--data --init --no-scratch --labels --seeds --lr --validation --steps --minutes --out --json"),
        ("evaluate", "--data --limit --matrix --json"),
        ("export", "--to --out --check --overwrite --json"),
        ("embed", "--data --out --part --layer --pooling --l2 --json"),
        ("neighbors", "--data --out --part --layer --pooling --queries --json"),
        ("map", "--data --out --part --layer --pooling --perplexity --side --json"),
        (
            "bench",
            "--data --image-size --preset --batch --workers --device --precision --threads --seconds --json --trace --compare",
        ),
        ("data check", "--data --json --strict --min-side --threads --max-bad"),
    ] {
        let help = works(&format!("{command} --help")).out;
        for flag in flags.split_whitespace() {
            assert!(help.contains(flag), "{command} --help has no {flag}: {help}");
        }
        assert!(help.contains("Examples:") && help.contains("[default: "), "{help}");
    }
    assert!(!works("pretrain --help").out.contains("--labels "), "pretraining uses no labels");
    assert!(!works("bench --help").out.contains("--lr "), "no rate decides over the speed");
    let table = works("fewlabel --help").out;
    for settled in ["--limit ", "--epochs ", "--seed ", "--eval-every "] {
        assert!(!table.contains(settled), "a table settles {settled}");
    }
    assert!(works("--version").out.contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn unknown_flags_and_commands_name_the_nearest() {
    fails("pretrain --stesp 3", 2, &["--stesp", "--steps"]);
    fails("pretrian", 2, &["pretrain"]);
    fails("finetune --label 5%", 2, &["--labels"]);
    let bare = ran(&mut selfie(""));
    assert_eq!(bare.code, Some(2));
    bare.says(&["Usage"]);
}

#[test]
fn unknown_keys_name_the_nearest() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("run.toml");
    let with = |content: &str, words: &[&str]| {
        write(&file, content.as_bytes());
        fails(&format!("config show -c {}", text(&file)), 2, words);
    };
    with("[train]\nwarm_up = 3\n", &["run.toml", "train.warm_up", "did you mean `train.warmup`"]);
    with("seed = 3\n", &["`seed`", "`train.seed`"]);
    with("[train\n", &["run.toml", "TOML"]);
    fails("config show --set train.lrr=1", 2, &["train.lrr", "did you mean `train.lr`"]);
    fails("config show -c nowhere.toml", 3, &["nowhere.toml"]);
    let misspelt = ran(selfie("config show").env("SELFIE_TRAIN_SED", "3"));
    assert_eq!(misspelt.code, Some(2));
    misspelt.says(&["SELFIE_TRAIN_SEED"]);
}

#[test]
fn wrong_values_name_key_value_origin_and_range() {
    for (flag, value, key, expected) in [
        ("--lr", "-1", "train.lr", "a number above 0"),
        ("--lr", "nan", "train.lr", "a number above 0"),
        ("--lr", "0", "train.lr", "a number above 0"),
        ("--lr", "fast", "train.lr", "a number above 0"),
        ("--batch", "0", "train.batch", "a whole number from 1"),
        ("--batch", "-3", "train.batch", "a whole number from 1"),
        ("--batch", "2.5", "train.batch", "a whole number from 1"),
        ("--device", "gpu", "run.device", "auto | cpu | cuda"),
        ("--preset", "huge", "model.preset", "tiny | small | resnet50"),
        ("--holdout", "inf", "data.holdout", "a number from 0 to 0.9"),
    ] {
        fails(&format!("config show {flag} {value}"), 2, &[key, value, flag, expected]);
    }
    fails("config show --set train.lr", 2, &["section.key=value"]);
    fails("config show --for pretrain --set data.labels=5%", 2, &["pretrain does not use data.labels"]);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("run.toml");
    for value in ["nan", "\"fast\"", "[1.0]"] {
        write(&file, format!("[train]\nlr = {value}\n").as_bytes());
        fails(&format!("config show -c {}", text(&file)), 2, &["train.lr", value, "run.toml", "a number above 0"]);
    }
}

#[test]
fn later_layers_win_and_are_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("run.toml");
    write(&file, b"[train]\nlr = 0.2\nwarmup = 7\nseed = 1\nbatch = 9\n");
    let line = format!(
        "config show --json --preset tiny -c {} --set train.seed=3 --set train.batch=10 --batch 11",
        text(&file)
    );
    let shown = ran(selfie(&line).env("SELFIE_TRAIN_WARMUP", "8").env("SELFIE_TRAIN_SEED", "2"));
    assert_eq!(shown.code, Some(0), "{}", shown.err);
    let config = shown.json();
    for (key, value, origin) in [
        ("train.momentum", "0.9", "default"),
        ("model.stem_width", "8", "preset tiny"),
        ("train.lr", "0.2", text(&file)),
        ("train.warmup", "8", "environment SELFIE_TRAIN_WARMUP"),
        ("train.seed", "3", "--set"),
        ("train.batch", "11", "--batch"),
    ] {
        assert_eq!(config[key]["value"].to_string(), value, "{key}");
        assert_eq!(config[key]["origin"], origin, "{key}");
    }
}

#[test]
fn one_length_of_training_wins() {
    let value = |flags: &str, key: &str| works(&format!("config show --json {flags}")).json()[key]["value"].to_string();
    // The preset's steps give way to epochs that were asked for.
    assert_eq!(value("--epochs 3", "train.steps"), "0");
    assert_eq!(value("--epochs 3", "train.epochs"), "3.0");
    assert_eq!(value("--set train.epochs=3 --minutes 2", "train.epochs"), "0.0");
    fails("config show --epochs 3 --steps 4", 2, &["train.epochs", "train.steps", "only one"]);
}

#[test]
fn the_template_is_the_defaults() {
    let template = works("config init").out;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("all.toml");
    let show = |flags: &str| -> Value { works(&format!("config show --json {flags}")).json() };
    // As printed: nothing is set.
    write(&file, template.as_bytes());
    assert_eq!(show(&format!("-c {}", text(&file))), show(""));
    // With every key uncommented: all are set, to what they are by default.
    let uncommented: Vec<_> = template
        .lines()
        .map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line))
        .collect();
    write(&file, uncommented.join("\n").as_bytes());
    for task in ["pretrain", "finetune", "evaluate"] {
        let defaults = show(&format!("--for {task}"));
        let all = show(&format!("--for {task} -c {}", text(&file)));
        for (key, entry) in all.as_object().expect("an object") {
            assert_eq!(entry["origin"], text(&file), "{key} is not in the template");
            if defaults[key]["origin"] == "default" {
                assert_eq!(entry["value"], defaults[key]["value"], "{key}");
            }
        }
    }
}

/// `cargo run` hands the commit to the program as a variable of its environment.
#[test]
fn variables_of_our_own_are_no_keys() {
    for name in ["SELFIE_COMMIT", "SELFIE_SIMD", "SELFIE_DATA"] {
        let ran = ran(selfie("config show").env(name, ""));
        assert_eq!(ran.code, Some(0), "{name}: {}", ran.err);
    }
}

/// A device has no end, and a file of gigabytes is something else.
#[cfg(unix)]
#[test]
fn what_is_too_long_for_a_configuration_is_not_read() {
    fails("config show -c /dev/zero", 2, &["/dev/zero", "no configuration"]);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("long.toml");
    write(&file, &vec![b'#'; (16 << 20) + 1]);
    fails(&format!("config show -c {}", text(&file)), 2, &["long.toml", "16777216 bytes"]);
    fails(&format!("config show -c {}", text(folder.path())), 2, &["no configuration"]);
}
