"""What an unknown key is answered with: the key that is meant, by meaning before letters.

A name in a table with a dot, sample.batch_size, is that name in that section alone.

People come from other trainers. Their word for a thing is not accepted (one thing, one name), but it is understood.
`today` reads configs that checkpoints stored under this program's own earlier names.
"""

import copy
import difflib
from collections.abc import Sequence
from typing import Any

# Key -> what it is called here, and what it is called elsewhere.
MEANINGS = {
    "train.optimizer.lr": ("the learning rate", "lr learning_rate base_lr max_lr peak_lr base_learning_rate rate"),
    "train.optimizer.betas": ("AdamW's pair of decays", "beta1 beta2 adam_beta1 adam_beta2 adam_betas b1 b2"),
    "train.optimizer.eps": ("AdamW's epsilon", "epsilon adam_eps adam_epsilon"),
    "train.optimizer.weight_decay": ("the weight decay", "wd decay_weight adam_weight_decay l2"),
    "train.optimizer.kind": (
        "the optimizer's name",
        "optimizer_type optimizer_name optim opt optimizer.name optimizer.type",
    ),
    "train.schedule.kind": (
        "the schedule of the learning rate",
        "scheduler lr_scheduler lr_schedule lr_scheduler_type",
    ),
    "train.schedule.warmup": (
        "the number of warm-up steps",
        "warmup_steps lr_warmup_steps num_warmup_steps warmup_iters warm_up",
    ),
    "train.schedule.final": (
        "the last learning rate, as a fraction of the peak,",
        "min_lr min_lr_ratio end_lr lr_min eta_min final_lr",
    ),
    "train.steps": (
        "the number of optimizer steps",
        "max_steps num_steps total_steps train_steps max_train_steps num_train_steps iterations max_iters num_iters "
        "train_iters training_steps num_training_steps",
    ),
    "train.global_batch": (
        "the number of samples of an optimizer step, over all ranks,",
        "batch batch_size global_batch_size train_batch_size total_batch_size effective_batch_size",
    ),
    "train.grad_accumulation": (
        "the number of micro-steps of an optimizer step",
        "gradient_accumulation_steps gradient_accumulation grad_accumulation_steps accum_steps accumulation "
        "accumulate_grad_batches num_microbatches accum_iter",
    ),
    "train.max_grad_norm": (
        "the largest gradient norm",
        "grad_clip clip clip_grad clip_grad_norm gradient_clip gradient_clipping gradient_clip_val max_norm",
    ),
    "train.precision": (
        "the compute type, bf16 or float32,",
        "dtype mixed_precision bf16 amp compute_dtype torch_dtype param_dtype use_bf16",
    ),
    "train.ema.decay": ("the decay of the averaged weights", "ema_decay ema_rate ema_beta ema_momentum use_ema"),
    "train.objective": ("what the model learns to predict", "loss loss_type prediction_type path_type flow diffusion"),
    "train.freeze": ("the list of parameters that stay as they start", "frozen freeze_layers trainable"),
    "data.folder": (
        "the dataset's folder or URL",
        "data_dir data_path dataset dataset_dir dataset_path data_root train_data train_data_dir train_dir path",
    ),
    "data.workers": ("the number of loader processes of a rank", "num_workers dataloader_num_workers n_workers"),
    "data.prefetch": ("the number of micro-batches that a worker keeps ready", "prefetch_factor"),
    "data.flip": ("mirroring at random", "random_flip hflip horizontal_flip flip_prob random_horizontal_flip"),
    "data.condition_dropout": (
        "the probability that a condition is dropped",
        "drop_condition class_dropout_prob cond_drop_prob cfg_dropout label_dropout caption_dropout uncond_prob "
        "drop_label_prob dropout_prob condition_dropout_prob",
    ),
    "data.shuffle_block": ("the number of shards that are shuffled together", "shuffle shuffle_buffer shuffle_size"),
    "model.size": ("the paper's size by name", "model_name model_size arch model_type"),
    "model.num_blocks": (
        "the number of transformer blocks",
        "depth num_layers n_layers layers n_layer num_hidden_layers blocks n_blocks",
    ),
    "model.hidden_size": ("the width of a token", "hidden_dim hidden dim width d_model embed_dim n_embd model_dim"),
    "model.num_heads": ("the number of attention heads", "n_heads heads n_head num_attention_heads nhead"),
    "model.patch": ("the height and width of a token in latent pixels", "patch_size p_size"),
    "model.input_size": (
        "the height and width of the latent (a VAE's latents are 8 times smaller than its images)",
        "image_size resolution img_size latent_size image_resolution sample_size",
    ),
    "model.out_channels": (
        "the number of predicted channels (twice in_channels for ddpm)",
        "learn_sigma learned_sigma",
    ),
    "model.num_experts": ("the number of experts of a layer", "experts n_experts n_routed_experts num_local_experts"),
    "model.top_k": (
        "the number of experts that a token chooses (family tc)",
        "topk num_experts_per_tok experts_per_token moe_top_k moe_router_topk k",
    ),
    "model.shared_experts": ("the number of experts that every token passes", "num_shared_experts n_shared_experts"),
    "model.balance_weight": (
        "the weight of the balance loss (family tc)",
        "aux_loss_weight aux_loss_coef moe_aux_loss_coeff balance_loss_weight router_aux_loss_coef",
    ),
    "model.text_width": ("the width of a caption token's features", "text_dim context_dim caption_channels cross_dim"),
    "model.text_length": ("the number of a caption's tokens", "max_length text_max_length max_tokens model_max_length"),
    "pool.capacity": (
        "training's capacity factor",
        "capacity_factor moe_capacity_factor expert_capacity train_capacity",
    ),
    "pool.span": ("the number of samples in one pool", "pool_size batch_level global_pool pool_span"),
    "text.encoder": ("the text encoder", "text_encoder text_encoder_name encoder_name text.name text.model"),
    "text.folder": ("the text encoder's local folder", "text_encoder_path t5_path clip_path tokenizer text.path"),
    "text.precision": (
        "the type that the text encoder computes in",
        "text.dtype text.torch_dtype text_dtype text.bf16",
    ),
    "parallel.expert_parallel": (
        "the number of ranks that share one copy of the experts",
        "ep ep_size expert_parallel_size expert_parallelism expert_model_parallel_size moe_ep_size ep_degree",
    ),
    "parallel.elastic": ("whether the number of ranks may be any", "elastic elasticity elastic_training"),
    "parallel.zero_stage": ("DeepSpeed's ZeRO stage", "zero stage zero_optimization zero_optimization_stage"),
    "parallel.deepspeed": ("a DeepSpeed JSON file of your own", "deepspeed_config ds_config "),
    "parallel.timeout_minutes": ("the longest wait for a peer", "timeout nccl_timeout ddp_timeout dist_timeout"),
    "compute.deterministic": (
        "sums in a fixed order on GPUs",
        "determinism deterministic_mode use_deterministic_algorithms",
    ),
    "compute.compile": ("torch.compile", "torch_compile use_compile compile_model"),
    "compute.recompute": (
        "recomputation of activations in the backward",
        "activation_checkpointing gradient_checkpointing grad_checkpointing activation_checkpoint recomputation remat "
        "checkpoint_activations",
    ),
    "compute.topk": ("the exact top-k over ranks", "select selection_algorithm"),
    "sample.chunk": (
        "the number of samples that are computed together",
        "sample.batch_size sample.batch sample.micro_batch sampling.batch_size sample_batch_size eval_batch_size",
    ),
    "sample.selection": ("the rule by which experts take tokens in sampling", "sample.select selection_rule"),
    "sample.capacity": ("the capacity factor of sample.selection topk", "eval_capacity_factor"),
    "sample.guidance": ("the scale of classifier-free guidance", "cfg_scale guidance_scale cfg cfg_strength"),
    "sample.guidance_interval": ("the times between which guidance acts", "cfg_interval guidance_low guidance_high"),
    "sample.steps": (
        "the number of the solver's steps",
        "num_sampling_steps sampling_steps num_inference_steps nfe sample_steps ddim_steps",
    ),
    "sample.sampler": ("the solver", "solver ode_solver sampling_method sampler_type"),
    "sample.vae": ("the VAE's local folder", "vae_path vae_folder autoencoder vae_ckpt vae.path vae.folder"),
    "sample.grid_every": ("the number of steps between sample grids", "sample_every eval_every vis_every image_every"),
    "sample.prompts": (
        "the list of prompts that grids show",
        "validation_prompts validation_prompt sample_prompts eval_prompts",
    ),
    "log.wandb": ("Weights & Biases, on or off,", "use_wandb enable_wandb log_wandb wandb.enabled"),
    "log.profile": (
        "the pair of the first and the last step that are traced",
        "profiler profile_steps torch_profiler enable_profiling use_profiler",
    ),
    "log.every": (
        "the number of steps between logged lines",
        "log_every log_interval logging_steps log_freq print_freq",
    ),
    "checkpoint.every": (
        "the number of steps between checkpoints",
        "save_every ckpt_every save_interval save_steps checkpoint_every checkpointing_steps save_freq",
    ),
    "checkpoint.background": (
        "writing checkpoints beside the training",
        "async async_save async_checkpoint async_checkpointing checkpoint.async save_async async_mode",
    ),
    "checkpoint.keep_last": (
        "the number of newest checkpoints that are kept",
        "save_total_limit keep_last_k max_checkpoints checkpoints_total_limit",
    ),
    "folder": (
        "the run's folder",
        "output_dir out_dir run_dir results_dir save_dir log_dir logdir workdir work_dir exp_dir experiment_dir outdir "
        "log.folder log.dir checkpoint.folder checkpoint.dir",
    ),
    "seed": ("the seed of everything random", "global_seed random_seed manual_seed"),
    "init_from": (
        "the run whose weights are the first",
        "pretrained init_checkpoint finetune_from pretrained_path load_weights pretrained_model",
    ),
}

# What is looked for and is no key.
EXPLAINED = {
    "epochs max_epochs num_epochs num_train_epochs n_epochs": "there is none, a run is counted in steps: set "
    "train.steps to epochs * samples of the dataset / train.global_batch",
    "micro_batch_size micro_batch train_micro_batch_size_per_gpu batch_size_per_gpu per_device_train_batch_size "
    "local_batch_size batch_per_gpu device_batch_size": "a rank's micro-batch follows: train.global_batch / "
    "train.grad_accumulation / ranks; set those two, so that the run is the same on any number of ranks",
    "resume_from resume_from_checkpoint load_checkpoint checkpoint_path ckpt ckpt_path load_path restore_from": "a run "
    "continues the newest checkpoint of its folder by itself (resume=auto); the weights of another run are taken by "
    "init_from",
    "fp16 half float16": "fp16 is not supported; train.precision is bf16 or float32",
    "num_gpus gpus n_gpus num_nodes nnodes nproc_per_node devices world_size": "the launcher says how many ranks there "
    "are: deepspeed --num_gpus N --module diffmoe_ep ..., or torchrun --nproc-per-node N -m diffmoe_ep ...",
    "tp tp_size tensor_parallel tensor_parallel_size pp pp_size pipeline_parallel pipeline_parallel_size": "only "
    "experts and data are sharded: set parallel.expert_parallel and parallel.zero_stage",
    "dp dp_size data_parallel data_parallel_size": "all ranks are data parallel, whatever parallel.expert_parallel is",
    "mlp_ratio ffn_dim ffn_hidden_size intermediate_size": "an FFN is 4 * model.hidden_size wide, an expert that over "
    "model.granularity",
    "wandb_project wandb_entity wandb_mode wandb_name": "set log.wandb=true; the environment says where it writes to "
    "(WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline), and a run is called by its folder",
    "report_to comet": "metrics stand in RUN/metrics.jsonl; log.tensorboard=true and log.wandb=true write them there "
    "too, and a DeepSpeed JSON file with a section comet, named by parallel.deepspeed, sends them on",
    "wall_clock_breakdown flops_profiler profile_step": "a trace of some steps is written with log.profile=[10,13]; "
    "speed and mfu stand in every line of metrics.jsonl",
    "num_samples n_samples num_images": "how many are drawn is an option of the verb, diffmoe sample RUN --samples N, "
    "and in a grid while training sample.grid_size",
    "run_name exp_name experiment_name run_id": "a run is called by its folder: set folder=runs/NAME",
    "dropout attn_dropout proj_drop": "the network has none; conditions are dropped by data.condition_dropout",
    "local_rank": "the launcher says it, and it is taken from the environment",
    "device": "a run takes the GPUs where there are some, else the CPU",
}

# This program's own names of before, in the order in which they were given up.
RENAMED = {
    "data.drop_condition": "data.condition_dropout",
    "model.hidden": "model.hidden_size",
    "model.blocks": "model.num_blocks",
    "model.heads": "model.num_heads",
    "model.kernel": "compute.kernel",
    "pool.select": "compute.topk",
    "train.batch": "train.global_batch",
    "train.accumulation": "train.grad_accumulation",
    "train.clip": "train.max_grad_norm",
    "train.recompute": "compute.recompute",
    "train.compile": "compute.compile",
    "train.optimizer.rate": "train.optimizer.lr",
    "train.optimizer.expert_rate": "train.optimizer.expert_lr_scale",
    "train.optimizer.router_rate": "train.optimizer.router_lr_scale",
    "parallel.expert": "parallel.expert_parallel",
    "parallel.overlap": "compute.overlap",
    "parallel.zero": "parallel.zero_stage",
}

_BY_NAME = {name: key for key, (_, names) in MEANINGS.items() for name in names.split()}
_EXPLAINED = {name: text for names, text in EXPLAINED.items() for name in names.split()}


def answer(key: str, here: Sequence[str], every: Sequence[str]) -> str:
    """What to say of an unknown dotted key; here: the names in its section; every: all dotted keys."""
    return f"unknown key {key}; {hint(key, here, every)}"


def hint(key: str, here: Sequence[str], every: Sequence[str]) -> str:
    """What is meant by an unknown key, else what is spelt nearly so, else what there is."""
    *path, name = key.lower().replace("-", "_").split(".")
    in_section = ".".join([*path[-1:], name])
    said = in_section if in_section in _BY_NAME or in_section in _EXPLAINED else name
    if key in RENAMED:
        return f"it is called {RENAMED[key]}"
    if said in _EXPLAINED:
        return _EXPLAINED[said]
    meant = [] if said != name else [other for other in every if name in (_last(other), other.replace(".", "_"))]
    if said in _BY_NAME and _BY_NAME[said] not in meant:
        meant.append(_BY_NAME[said])
    if meant:
        return _meaning(meant)
    sections = list(dict.fromkeys(other.rpartition(".")[0] for other in every))
    for section in sections:
        if _last(section) == name:
            return f"{section} is a section with the keys {', '.join(_names(section, every))}"
    section = key.rpartition(".")[0]
    if not here and path:  # its section is not known either, but perhaps by its last name
        section = next((other for other in sections if _last(other) == path[-1]), section)
        here = _names(section, every)
    near = [f"{section}.{other}" if section else other for other in _near(name, here, 0.7)[:1]]
    elsewhere = _near(name, [*map(_last, every), *_BY_NAME], 0.8)
    if near := near or [other for other in every if {_last(other), *_names_of(other)} & {*elsewhere}]:
        return f"did you mean {' or '.join(near)}?"
    return (
        f"the keys {f'of {section}' if section else 'here'} are {', '.join(here)}" if here else "list all: diffmoe keys"
    )


def _meaning(keys: Sequence[str]) -> str:
    """What each of some keys is."""
    if len(keys) == 1 and keys[0] in MEANINGS:
        return f"{MEANINGS[keys[0]][0]} is {keys[0]}"
    told = [f"{key}, {MEANINGS[key][0].rstrip(',')}" if key in MEANINGS else key for key in keys]
    return f"did you mean {', or '.join(told)}?"


def _names(section: str, every: Sequence[str]) -> list[str]:
    """The names in a section, its own sections among them."""
    within = [key.removeprefix(f"{section}.") for key in every if key.startswith(f"{section}.")]
    return list(dict.fromkeys(name.partition(".")[0] for name in within))


def _names_of(key: str) -> list[str]:
    """What a key is called elsewhere."""
    return MEANINGS[key][1].split() if key in MEANINGS else []


def _near(name: str, names: Sequence[str], cutoff: float) -> list[str]:
    """Names spelt nearly so; whoever mistypes one rarely begins with another letter."""
    return [other for other in difflib.get_close_matches(name, names, n=3, cutoff=cutoff) if other[0] == name[:1]]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def today(tree: dict[str, Any]) -> dict[str, Any]:
    """A stored config under the names of today; what a user writes is never translated."""
    result = copy.deepcopy(tree)
    for old, new in RENAMED.items():
        *path, name = old.split(".")
        place: Any = result
        for part in path:
            place = place.get(part) if isinstance(place, dict) else None
        if isinstance(place, dict) and name in place:
            value = place.pop(name)
            *path, name = new.split(".")
            place = result
            for part in path:
                place[part] = place.get(part) or {}
                place = place[part]
                if not isinstance(place, dict):
                    return tree  # it is no config, which is for its reader to say
            place[name] = value
    return result


def meant_by(name: str) -> str | None:
    """The key that another program's name for it means; None: not known."""
    return _BY_NAME.get(name.lower().replace("-", "_"))
