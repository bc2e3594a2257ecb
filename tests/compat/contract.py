"""Methods and attributes of vLLM's objects that align relies on; imports, calls and subclasses do not show them.

tests/unit/rollout/test_library_vllm.py checks the same tables in the installed vLLM, by `inspect` instead of `ast`.
"""

from __future__ import annotations

from typing import Any

TRANSFER = "vllm.distributed.weight_transfer"
LAYERS = "vllm.model_executor.layers"
RELOAD = "vllm.model_executor.model_loader.reload"
ROUTER = f"{LAYERS}.fused_moe.router"

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("vllm:LLM.generate", {"prompts": [], "sampling_params": [], "use_tqdm": False}),
    ("vllm:LLM.start_weight_update", {}),
    ("vllm:LLM.update_weights", {"request": {}}),
    ("vllm:LLM.finish_weight_update", {"weight_version": "1"}),
    ("vllm:LLM.update_weight_version", {"new_version": "0"}),
    ("vllm:LLM.reset_prefix_cache", {}),
    ("vllm:LLM.sleep", {"level": 2}),
    ("vllm:LLM.wake_up", {}),
    ("vllm.v1.engine.llm_engine:LLMEngine.add_request", {"request_id": "1", "prompt": 0, "params": 0}),
    ("vllm.v1.engine.llm_engine:LLMEngine.step", {}),
    ("vllm.v1.engine.llm_engine:LLMEngine.abort_request", {"request_ids": []}),
    ("vllm.v1.engine.core_client:InprocClient.shutdown", {}),
    (f"{TRANSFER}.base:WeightTransferEngine.__init__", {"config": 0, "vllm_config": 0, "device": 0, "model": 0}),
    (f"{TRANSFER}.base:WeightTransferEngine.start_weight_update", {}),
    (f"{TRANSFER}.base:WeightTransferEngine.update_weights", {"update_info": {}}),
    (f"{TRANSFER}.base:WeightTransferEngine.finish_weight_update", {}),
    (f"{TRANSFER}.base:WeightTransferEngine.receive_weights", {"update_info": None}),
    (f"{TRANSFER}.base:WeightTransferEngine.init_transfer_engine", {"init_info": None}),
    (f"{TRANSFER}.base:TrainerWeightTransferEngine.send_weights", {}),
    (f"{TRANSFER}.base:TrainerWeightTransferEngine.shutdown", {}),
    (f"{TRANSFER}.ipc_engine:IPCTrainerWeightTransferEngine._all_gather_and_merge_handles", {"handles": []}),
    (f"{TRANSFER}.ipc_engine:IPCTrainerWeightTransferEngine.trainer_init", {"init_info": 0, "client": 0, "source": 0}),
    (f"{TRANSFER}:WeightTransferTrainerFactory.trainer_init", {"init_info": 0, "client": 0, "source": 0}),
    (f"{TRANSFER}.nccl_engine:NCCLTrainerInitInfo", dict.fromkeys(
        ("rank", "master_address", "master_port", "world_size", "packed_buffer_size_bytes"), 0)),
    (f"{TRANSFER}.ipc_engine:IPCTrainerInitInfo", {"rank": 0, "packed": True}),
    (f"{TRANSFER}.clients:HTTPVLLMWeightSyncClient.update_weights", {"update_info": {}}),
    (f"{TRANSFER}.clients:HTTPVLLMWeightSyncClient.init_weight_transfer_engine", {"init_info": {}}),
    ("vllm.v1.worker.worker_base:WorkerWrapperBase.__init__", {}),
    ("vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_model", {}),
    ("vllm.v1.worker.utils:request_memory", {"init_snapshot": 0, "cache_config": 0}),
    (f"{LAYERS}.vocab_parallel_embedding:ParallelLMHead.tie_weights", {"embed_tokens": 0}),
    (f"{RELOAD}.types:LayerReloadingInfo.can_load", {}),
    (f"{LAYERS}.quantization.base_config:QuantizeMethodBase.process_weights_after_loading", {"layer": 0}),
    (f"{ROUTER}.base_router:BaseRouter.set_capture_fn", {"capture_fn": None}),
    (f"{LAYERS}.rotary_embedding.base:RotaryEmbedding.forward_native", {"positions": 0, "query": 0, "key": 0}),
    ("vllm.v1.engine.async_llm:AsyncLLM.add_lora", {"lora_request": 0}),
    ("vllm.v1.engine.async_llm:AsyncLLM.remove_lora", {"lora_id": 1}),
    ("vllm.v1.engine.async_llm:AsyncLLM.check_health", {}),
    ("vllm.v1.engine.async_llm:AsyncLLM.generate",
     {"prompt": 0, "sampling_params": 0, "request_id": "1", "lora_request": None}),
]  # fmt: skip
"""(function or class, arguments that we pass); methods without `self`."""

ATTRIBUTES: list[tuple[str, str]] = [
    ("vllm.outputs:RequestOutput", "request_id prompt_token_ids prompt_logprobs outputs finished num_cached_tokens"),
    ("vllm.outputs:CompletionOutput", "token_ids logprobs routed_experts finish_reason weight_versions"),
    ("vllm.config:VllmConfig", "cache_config model_config quant_config aux_output_config weight_transfer_config"),
    ("vllm.config:CacheConfig", "num_gpu_blocks block_size gpu_memory_utilization kv_cache_memory_bytes"),
    ("vllm.config:ModelConfig", "enable_sleep_mode hf_config max_model_len dtype"),
    ("vllm:LLM", "llm_engine"),
    ("vllm.v1.engine.llm_engine:LLMEngine", "engine_core vllm_config model_executor"),
    ("vllm.v1.executor.uniproc_executor:UniProcExecutor", "driver_worker"),
    ("vllm.v1.worker.worker_base:WorkerWrapperBase", "worker"),
    ("vllm.v1.worker.gpu_worker:Worker", "model_runner"),
    ("vllm.v1.worker.gpu_model_runner:GPUModelRunner", "input_batch query_start_loc"),
    ("vllm.v1.worker.gpu_input_batch:InputBatch", "req_ids num_reqs"),
    ("vllm.v1.utils:CpuGpuBuffer", "np"),
    ("vllm.v1.core.sched.scheduler:Scheduler", "_preempt_request"),
    (f"{TRANSFER}.ipc_engine:IPCWeightTransferEngine", "_packed_importer"),
    (f"{TRANSFER}.ipc_engine:IPCTrainerWeightTransferEngine", "packed_buffer_size_bytes _post_send_sync"),
    (f"{TRANSFER}.base:TrainerWeightTransferEngine", "source"),
    (f"{LAYERS}.attention:Attention", "use_direct_call kv_sharing_target_layer_name"),
    (f"{LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding", "quant_method weight_loader"),
    (f"{LAYERS}.linear:QKVParallelLinear", "quant_method weight_loader"),
    (f"{LAYERS}.linear:MergedColumnParallelLinear", "quant_method weight_loader"),
    (f"{LAYERS}.linear:RowParallelLinear", "quant_method weight_loader"),
    (f"{LAYERS}.fused_moe.routed_experts_capturer:RoutedExpertsCaptureSource", "layer_id capture_fn"),
    (f"{LAYERS}.fused_moe.runner.moe_runner:MoERunner", "layer_id router"),
    (f"{TRANSFER}.base:WeightTransferEngine", "model model_config reset_weight_update_target"),
    (f"{RELOAD}.types:LayerReloadingInfo", "load_numel load_numel_total loaded_weights"),
    (f"{LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding", "shard_indices"),
    (
        f"{LAYERS}.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices",
        "num_elements_padded num_org_elements",
    ),
    (f"{LAYERS}.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod", "moe_kernel"),
    (
        f"{ROUTER}.cpu_router:CPURouter",
        "use_grouped_topk num_expert_group topk_group scoring_func e_score_correction_bias custom_routing_function",
    ),
    (f"{LAYERS}.rotary_embedding.base:RotaryEmbedding", "forward_cpu"),
    ("vllm.model_executor.models.transformers.base:Base", "_decorate_for_torch_compile"),
    ("vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase", "token_lora_indices"),
    ("vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU", "add_lora_linear"),
    ("vllm.entrypoints.openai.models.serving:OpenAIServingModels", "lora_requests"),
]  # fmt: skip
"""(class, attributes that we read or set)."""

READ: list[tuple[str, str]] = [
    (f"{LAYERS}.attention:Attention.forward", "self.use_direct_call"),
    (f"{LAYERS}.linear:RowParallelLinear.forward", "self.quant_method"),
    (f"{LAYERS}.linear:UnquantizedLinearMethod.create_weights", "weight_loader"),
    (f"{LAYERS}.logits_processor:LogitsProcessor._apply_head", "lm_head.quant_method.apply"),
    ("vllm.v1.engine.core:EngineCore.shutdown", "cleanup_dist_env_and_memory"),
    (f"{TRANSFER}.ipc_engine:IPCTrainerWeightTransferEngine._send_packed", "self._all_gather_and_merge_handles"),
    (f"{TRANSFER}.ipc_engine:IPCTrainerWeightTransferEngine._send_packed", "self.packed_buffer_size_bytes"),
    (f"{TRANSFER}.ipc_engine:IPCTrainerWeightTransferEngine.send_weights", "self._post_send_sync"),
    (f"{TRANSFER}.ipc_engine:IPCTrainerWeightTransferEngine.send_weights", "self.source"),
    (f"{TRANSFER}.nccl_engine:NCCLTrainerWeightTransferEngine.send_weights", "self.source"),
    # The facts that `align.rollout.sync.reload` and `align.rollout.vllm_fixes` rely on.
    ("vllm.v1.worker.gpu_worker:Worker.update_weights", "reset_weight_update_target()"),
    ("vllm.v1.worker.gpu_worker:Worker.finish_weight_update", "reset_weight_update_target()"),
    (f"{TRANSFER}.nccl_engine:NCCLWeightTransferEngine.receive_weights", "self.model.load_weights"),
    (f"{TRANSFER}.ipc_engine:IPCWeightTransferEngine.receive_weights", "self.model.load_weights"),
    (f"{RELOAD}.layerwise:initialize_layerwise_reload", "if info.can_load():"),
    (f"{RELOAD}.layerwise:finalize_layerwise_processing", "if info.load_numel <= 0:"),
    (f"{RELOAD}.layerwise:_wrap_parameters_weight_loader", "_get_weight_loader(tensor).__name__"),
    (f"{LAYERS}.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod._setup_kernel",
     "self.moe_kernel is not None"),
    (f"{ROUTER}.base_router:BaseRouter._select_experts", "self.capture_fn(topk_ids)"),
    (f"{ROUTER}.cpu_router:CPURouter._compute_routing", "if self.use_grouped_topk:"),
    ("vllm.model_executor.models.transformers.base:Base.__init__", "self._decorate_for_torch_compile()"),
    ("vllm.model_executor.models.gpt_oss:OAIAttention.__init__", "self.sinks = "),
    ("vllm.v1.worker.utils:request_memory", "gpu_memory_utilization"),
    ("vllm.v1.worker.gpu_worker:Worker.determine_available_memory", "kv_cache_memory_bytes"),
    ("vllm.v1.worker.gpu_worker:Worker.sleep", "level == 2"),
    ("vllm.v1.attention.backends.triton_attn:TritonAttentionBackend.supports_head_size", ">= 32"),
]  # fmt: skip
"""(function of vLLM, text in its source): what we set is read there."""

OPTIONS: list[tuple[str, str, list[str]]] = [
    (
        "align/rollout/vllm_options.py",
        "engine_options cache_options model_options",
        ["vllm.engine.arg_utils:AsyncEngineArgs"],
    ),
    ("align/rollout/vllm_options.py", "sampling_options", ["vllm:SamplingParams"]),
    (
        "align/serve/command.py",
        "_vllm_arguments",
        [
            "vllm.engine.arg_utils:AsyncEngineArgs",
            "vllm.entrypoints.common.cli_args:FrontendArgs",
            "vllm.entrypoints.launchers.cli_args:FrontendArgs",
        ],
    ),
    (
        "align/rollout/serve.py",
        "serve",
        [
            "vllm.engine.arg_utils:AsyncEngineArgs",
            "vllm.entrypoints.common.cli_args:FrontendArgs",
            "vllm.entrypoints.launchers.cli_args:FrontendArgs",
        ],
    ),
]
"""(file of ours, functions whose dictionaries have these keys, classes of vLLM of which one has a field per key)."""
OTHER_KEYS = {"backend", "transfer", "routing", "sleeps"}
"""Keys in these functions that are no options of vLLM."""
ENVIRONMENT = "vllm/envs.py"
SERVERS = "vllm/entrypoints"
