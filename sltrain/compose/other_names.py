"""What other trainers call the keys of a run, so that a name typed by habit is answered with ours.

The names are those of the Hugging Face Trainer, the published code of GaLore and SLTrain, torchtitan, litgpt, nanoGPT
and PyTorch Lightning. A name that is a key here is never looked up. Options of earlier versions that are gone follow.
"""

# Our key, or words that name our keys -> names that others have for it.
OTHERS = {
    "lr": "learning_rate max_lr peak_lr base_lr initial_lr step_size",
    "min_lr_ratio (the final learning rate over the peak)": "min_lr min_learning_rate final_lr lr_end min_lr_factor",
    "schedule (cosine, linear, wsd or constant, after warmup_steps)": "scheduler scheduler_name lr_scheduler"
    " lr_scheduler_type lr_schedule schedule_type decay_lr lr_decay_style decay_type",
    "decay_steps (of schedule=wsd)": "lr_decay_iters lr_decay_steps num_decay_steps cooldown_steps cooldown"
    " lr_wsd_decay_iters decay_ratio",
    "warmup_steps": "warmup warmup_iters lr_warmup_steps num_warmup_steps lr_warmup_iters",
    "warmup_steps (a number of updates)": "warmup_ratio warmup_fraction warmup_epochs",
    "weight_decay": "wd decay l2",
    "optimizer.betas, as in optimizer.betas=[0.9,0.95]": "betas beta1 beta2 adam_beta1 adam_beta2",
    "optimizer.eps": "eps epsilon adam_eps adam_epsilon",
    "optimizer": "optim optimizer_name optimizer_type",
    "grad_clip": "max_grad_norm gradient_clipping grad_clipping gradient_clip gradient_clip_val clip_grad max_norm"
    " clip_grad_norm grad_norm_clip clip_norm",
    "global_batch_size (sequences an update, all processes together) or micro_batch_size (sequences a pass)": "batch"
    " batch_size train_batch_size bs mbs gbs",
    "micro_batch_size": "per_device_train_batch_size per_device_batch_size per_gpu_train_batch_size device_batch_size"
    " local_batch_size train_micro_batch_size_per_gpu per_device_eval_batch_size eval_batch_size",
    "global_batch_size": "total_batch_size effective_batch_size",
    "global_batch_size: an update has as many passes of micro_batch_size as it takes": "gradient_accumulation"
    " gradient_accumulation_steps grad_accum grad_accumulation_steps gradient_accumulation_iters accumulation_steps"
    " accumulate_grad_batches accumulation",
    "seq_len": "max_length max_len max_seq_length max_seq_len seq_length sequence_length context_length context_size"
    " context_window ctx_len n_ctx model_max_length",
    "max_steps": "steps num_steps train_steps training_steps num_training_steps total_steps max_iters iterations"
    " num_iterations train_iters max_train_steps max_updates updates",
    "max_steps or max_tokens: a run has a budget of updates or of positions, not of epochs": "epochs num_epochs"
    " max_epochs n_epochs num_train_epochs epoch",
    "max_tokens (with max_steps=null)": "max_train_tokens num_tokens train_tokens total_tokens token_budget",
    "sparsity": "delta density sparse_ratio sp_ratio sparsity_ratio",
    "rank": "r lora_r lora_rank low_rank_rank",
    "alpha (B A is scaled by alpha / rank)": "lora_alpha scale lora_scaling scaling galore_scale",
    "rank_overrides or sparsity_overrides, with patterns of layer names": "target_modules lora_target_modules"
    " target_modules_list",
    "method": "peft_model peft method_name",
    "model": "model_name model_config model_name_or_path model_size model_type config_name flavor arch architecture"
    " size preset",
    "model.hidden_size": "n_embd d_model dim embed_dim hidden_dim",
    "model.num_hidden_layers": "n_layer n_layers num_layers layers depth",
    "model.num_attention_heads": "n_head n_heads num_heads heads",
    "model.num_key_value_heads": "n_kv_heads num_kv_heads n_query_groups kv_heads",
    "model.intermediate_size": "ffn_dim d_ff ffn_hidden_size mlp_dim ffn_size",
    "model.vocab_size": "vocab vocab_size padded_vocab_size",
    "model.tie_word_embeddings": "tie_embeddings tie_weights weight_tying tied_embeddings tie_word_embeddings",
    "ema": "ema_decay use_ema ema_beta ema_rate model_ema",
    "z_loss": "z_loss_weight z_loss_coef zloss lse_square_scale z_loss_multiplier",
    "model.rope_scaling": "rope_scaling rope_parameters use_scaled_rope",
    "model.rope_theta": "rope_theta rope_base theta",
    "dtype=bfloat16": "bf16 pure_bf16 use_bf16 half fp16 float16",
    "precision=mixed": "mixed_precision amp autocast use_amp",
    "dtype": "torch_dtype param_dtype data_type",
    "activation_checkpointing": "gradient_checkpointing use_gradient_checkpointing grad_checkpointing"
    " checkpoint_activations activation_checkpoint recompute gradient_checkpoint",
    "compile": "torch_compile use_compile compile_model use_torch_compile",
    "device": "accelerator backend use_cpu no_cuda",
    "run_dir": "output_dir out_dir save_dir checkpoint_dir outdir out output log_dir logging_dir experiment_dir"
    " dump_folder exp_dir results_dir run_name exp_name work_dir workdir save_path save",
    "checkpoint_every": "save_every save_steps save_interval checkpoint_interval ckpt_interval ckpt_every save_freq"
    " checkpointing_steps save_frequency always_save_checkpoint",
    "checkpoint_async": "async_save async_checkpoint async_mode use_async_save enable_async_checkpointing save_async",
    "keep_last": "save_total_limit keep_latest_k max_checkpoints keep_checkpoints",
    "log_every": "logging_steps log_interval log_freq log_steps log_every_n_steps logging_interval print_every",
    "eval_every": "eval_steps eval_interval val_interval val_check_interval eval_freq evaluation_steps eval_strategy"
    " evaluation_strategy val_every",
    "eval_tokens": "eval_iters max_eval_samples eval_batches max_iters_eval limit_val_batches",
    "init_from (a run, an export or a transformers folder)": "init_from_checkpoint pretrained from_pretrained"
    " load_from pretrained_model initial_load_path finetune_from load_weights",
    "run_dir, the folder of the run to continue": "resume_from_checkpoint resume_from continue_from resume_path"
    " checkpoint_path load_checkpoint autoresume ckpt_path",
    "data=hf repo=OWNER/NAME, data=local path=GLOB, data=c4 or data=stdlib": "dataset dataset_name dataset_path"
    " datasets data_name corpus hf_dataset dataset_repo",
    "config (data=hf)": "dataset_config_name dataset_config subset dataset_subset",
    "split (data=hf)": "dataset_split train_split",
    "data.validation_split (data=hf)": "validation_split eval_split dataset_eval_split",
    "path": "data_path data_dir data_files train_file train_files train_data train_path dataset_dir training_data",
    "validation_path": "validation_file eval_file val_file val_path eval_path valid_path val_data eval_data test_path",
    "tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_dir tokenizer_file",
    "tokenizer_eos": "eos eos_token eos_token_id eod_token append_eod append_eos add_eos",
    "data.text_key (data=local, data=hf)": "text_key text_column text_field text_column_name dataset_text_field"
    " content_key json_key json_keys jsonl_keys column column_name",
    "padding=pack": "packing group_by_length group_texts pack concat_tokens",
    "padding": "packing_strategy packing_algorithm",
    "tracker=wandb": "wandb report_to use_wandb wandb_log logger logger_name log_with enable_wandb with_tracking"
    " trackers wandb_enabled",
    "tracker=tensorboard": "tensorboard use_tensorboard tensorboard_log tensorboard_dir enable_tensorboard",
    "tracker.project": "wandb_project project project_name",
    "tracker.entity": "wandb_entity entity",
    "profile_steps": "profile profiler profiling profile_step enable_profiling use_profiler torch_profiler",
    "hang_timeout (seconds)": "ddp_timeout timeout nccl_timeout dist_timeout train_timeout_seconds"
    " distributed_timeout_minutes init_timeout_seconds process_group_timeout collective_timeout",
    "seed": "random_seed data_seed manual_seed rng_seed",
    "per_layer_update": "layerwise layer_wise per_layer per_layer_weight_update galore_adamw8bit_per_layer",
}
OTHER_NAMES = {name: ours for ours, names in OTHERS.items() for name in names.split()}  # the other way round

# GROUP=NAME of an earlier version -> what to take instead.
REMOVED = {
    "optimizer=adam4bit": "take optimizer=scale, or optimizer=muon optimizer.momentum_dtype=int8"
    " optimizer.others=scale: both need less memory"
}
# The plug-in that reads the options of a removed one from the config.yaml of a run, whose weights can still be opened.
READ_AS = {"optimizer=adam4bit": "adamw"}
