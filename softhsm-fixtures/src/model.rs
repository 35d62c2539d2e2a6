//! A model directory that looks like a real one: safetensors shards, their index, config and tokenizer.

use std::fs;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::Context as _;

/// Writes the model: `shards` files of about `shard_bytes` each, and the small files around them.
pub fn create(directory: &Path, shards: usize, shard_bytes: usize) -> anyhow::Result<()> {
    fs::create_dir_all(directory.join("1_Pooling")).context("the model directory")?;
    let small = [
        ("config.json", r#"{"architectures":["LlamaForCausalLM"],"hidden_size":512,"num_hidden_layers":8}"#),
        ("generation_config.json", r#"{"do_sample":true,"temperature":0.6}"#),
        ("tokenizer_config.json", r#"{"model_max_length":4096,"tokenizer_class":"PreTrainedTokenizerFast"}"#),
        (
            "tokenizer.json",
            r#"{"version":"1.0","model":{"type":"BPE","vocab":{"<s>":0,"</s>":1},"merges":[]}}"#,
        ),
        ("1_Pooling/config.json", r#"{"pooling_mode_mean_tokens":true}"#),
        ("README.md", "# A model to try omsign with\n\nIts weights are random numbers.\n"),
    ];
    for (name, text) in small {
        fs::write(directory.join(name), text).with_context(|| name.to_owned())?;
    }
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut map = Vec::new();
    for shard in 1..=shards {
        let name = format!("model-{shard:05}-of-{shards:05}.safetensors");
        let tensor = format!("model.layers.{shard}.mlp.weight");
        // safetensors: a little-endian length, a JSON header of that length, then the tensors' bytes.
        let bytes = shard_bytes / 8 * 8;
        let header =
            format!(r#"{{"{tensor}":{{"dtype":"F32","shape":[{}],"data_offsets":[0,{bytes}]}}}}"#, bytes / 4);
        let mut file = BufWriter::new(fs::File::create(directory.join(&name)).with_context(|| name.clone())?);
        file.write_all(&u64::try_from(header.len())?.to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for _ in 0..bytes / 8 {
            // xorshift64: reproducible, and does not compress.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            file.write_all(&random.to_le_bytes())?;
        }
        file.flush()?;
        map.push(format!(r#""{tensor}":"{name}""#));
    }
    let index = format!(
        r#"{{"metadata":{{"total_size":{}}},"weight_map":{{{}}}}}"#,
        shards * shard_bytes,
        map.join(",")
    );
    fs::write(directory.join("model.safetensors.index.json"), index).context("the index")
}
