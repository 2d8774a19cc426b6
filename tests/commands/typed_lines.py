"""What the documents and scripts of the originals type, old and new: every distinct command line for our families.

VideoX-Fun 804a425, EasyAnimate c2a70d1, and the guides that the defaults are of. Each line: the command and the family
that it is here, the strategies that its launchers choose, and what it types beside ``COMMON``.
"""

COMMON = """
--pretrained_model_name_or_path=$MODEL_NAME --train_data_dir=$DATASET_NAME
--train_data_meta=$DATASET_META_NAME --train_batch_size=1 --gradient_accumulation_steps=1
--dataloader_num_workers=8 --num_train_epochs=100 --gradient_checkpointing --mixed_precision=bf16
--adam_epsilon=1e-10 --vae_mini_batch=1 --max_grad_norm=0.05 --random_hw_adapt
--training_with_video_token_length --enable_bucket
"""
"""What every one of them types."""

LINES: list[tuple[str, str, str, str]] = [
    (
        # cogvideox_fun/README_TRAIN.md; cogvideox_fun/train.sh
        "train",
        "cogvideox-fun",
        "fsdp single zero2",
        "--image_sample_size=512 --video_sample_size=512 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=50 --learning_rate=2e-05 "
        "--lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=42 "
        "--output_dir=output_dir_cogvideox_fun --adam_weight_decay=3e-2 --train_mode=inpaint "
        "--trainable_modules . ",
    ),
    (
        # cogvideox_fun/README_TRAIN_CONTROL.md
        "train",
        "cogvideox-fun",
        "fsdp single zero2",
        "--image_sample_size=512 --video_sample_size=512 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=50 --learning_rate=2e-05 "
        "--lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=43 "
        "--output_dir=output_dir_cog_control --adam_weight_decay=3e-2 --trainable_modules . ",
    ),
    (
        # cogvideox_fun/README_TRAIN_CONTROL.md; cogvideox_fun/train_control.sh
        "train",
        "cogvideox-fun",
        "fsdp single zero2",
        "--image_sample_size=512 --video_sample_size=512 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=50 --learning_rate=2e-05 "
        "--lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=43 "
        "--output_dir=output_dir_cogvideox_fun_control --adam_weight_decay=3e-2 --trainable_modules . ",
    ),
    (
        # cogvideox_fun/README_TRAIN_LORA.md; cogvideox_fun/train_lora.sh
        "lora",
        "cogvideox-fun",
        "fsdp single zero2",
        "--image_sample_size=512 --video_sample_size=512 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=50 --learning_rate=1e-04 "
        "--seed=42 --output_dir=output_dir_cogvideox_fun_lora --adam_weight_decay=3e-2 --rank=64 "
        "--network_alpha=32 --target_name=to_q,to_k,to_v,ff.0,ff.2 --use_peft_lora --low_vram "
        "--train_mode=inpaint ",
    ),
    (
        # hunyuanvideo/README_TRAIN.md; hunyuanvideo/train.sh
        "train",
        "hunyuanvideo-t2v",
        "fsdp single zero2",
        "--image_sample_size=640 --video_sample_size=640 --token_sample_size=640 --video_sample_stride=2 "
        "--video_sample_n_frames=81 --video_repeat=1 --checkpointing_steps=50 --learning_rate=2e-05 "
        "--lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=42 "
        "--output_dir=output_dir_hunyuanvideo --adam_weight_decay=3e-2 --uniform_sampling --low_vram "
        "--train_mode=normal --trainable_modules . ",
    ),
    (
        # hunyuanvideo/README_TRAIN_LORA.md
        "lora",
        "hunyuanvideo-t2v",
        "fsdp single zero2",
        "--image_sample_size=640 --video_sample_size=640 --token_sample_size=640 --video_sample_stride=2 "
        "--video_sample_n_frames=81 --video_repeat=1 --checkpointing_steps=50 --learning_rate=1e-04 "
        "--seed=42 --output_dir=output_dir_hunyuanvideo_lora --adam_weight_decay=3e-2 --uniform_sampling "
        "--rank=64 --network_alpha=32 --target_name=to_q,to_k,to_v,ff.0,ff.2,ff_context.0,ff_context.2 "
        "--use_peft_lora --low_vram ",
    ),
    (
        # hunyuanvideo/train_lora.sh
        "lora",
        "hunyuanvideo-t2v",
        "single",
        "--image_sample_size=640 --video_sample_size=640 --token_sample_size=640 --video_sample_stride=2 "
        "--video_sample_n_frames=81 --video_repeat=1 --checkpointing_steps=50 --learning_rate=1e-04 "
        "--seed=42 --output_dir=output_dir_hunyuanvideo_lora --adam_weight_decay=3e-2 --uniform_sampling "
        "--rank=64 --network_alpha=32 --target_name=to_q,to_k,to_v,ff.0,ff.2,ff_context.0,ff_context.2 "
        "--use_peft_lora --low_vram --train_mode=normal ",
    ),
    (
        # wan2.1_fun/README_TRAIN_CONTROL.md; wan2.1_fun/train_control.sh
        "train",
        "wan-fun-control",
        "fsdp single zero2",
        "--config_path=config/wan2.1/wan_civitai.yaml --image_sample_size=640 --video_sample_size=640 "
        "--token_sample_size=640 --video_sample_stride=2 --video_sample_n_frames=81 --video_repeat=1 "
        "--checkpointing_steps=50 --learning_rate=2e-05 --lr_scheduler=constant_with_warmup "
        "--lr_warmup_steps=100 --seed=42 --output_dir=output_dir_wan2.1_fun_control "
        "--adam_weight_decay=3e-2 --uniform_sampling --low_vram --train_mode=control_ref "
        "--control_ref_image=random --add_full_ref_image_in_self_attention --trainable_modules . ",
    ),
    (
        # wan2.1_fun/README_TRAIN_CONTROL_LORA.md; wan2.1_fun/train_control_lora.sh
        "lora",
        "wan-fun-control",
        "fsdp single zero2 zero3",
        "--config_path=config/wan2.1/wan_civitai.yaml --image_sample_size=640 --video_sample_size=640 "
        "--token_sample_size=640 --video_sample_stride=2 --video_sample_n_frames=81 --video_repeat=1 "
        "--checkpointing_steps=50 --learning_rate=1e-04 --seed=42 "
        "--output_dir=output_dir_wan2.1_fun_control_lora --adam_weight_decay=3e-2 --uniform_sampling "
        "--train_mode=control_ref --control_ref_image=random --add_full_ref_image_in_self_attention "
        "--rank=64 --network_alpha=32 --target_name=q,k,v,ffn.0,ffn.2 --use_peft_lora --low_vram ",
    ),
    (
        # wan2.2/README_TRAIN_S2V.md; wan2.2/train_s2v.sh
        "train",
        "wan-s2v",
        "fsdp single",
        "--config_path=config/wan2.2/wan_civitai_s2v.yaml --video_sample_size=640 --token_sample_size=640 "
        "--video_sample_stride=2 --video_sample_n_frames=80 --checkpointing_steps=50 "
        "--learning_rate=2e-05 --lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=42 "
        "--output_dir=output_dir_wan2.2_s2v --adam_weight_decay=3e-2 --uniform_sampling "
        "--boundary_type=full --control_ref_image=random --low_vram --trainable_modules . ",
    ),
    (
        # wan2.2/train_s2v_lora.sh
        "lora",
        "wan-s2v",
        "single",
        "--config_path=config/wan2.2/wan_civitai_s2v.yaml --video_sample_size=640 --token_sample_size=640 "
        "--video_sample_stride=2 --video_sample_n_frames=80 --checkpointing_steps=50 "
        "--learning_rate=1e-04 --seed=42 --output_dir=output_dir_wan2.2_s2v_lora --adam_weight_decay=3e-2 "
        "--uniform_sampling --boundary_type=full --control_ref_image=random --rank=64 --network_alpha=32 "
        "--target_name=q,k,v,ffn.0,ffn.2 --use_peft_lora --low_vram ",
    ),
    (
        # README_TRAIN_CONTROL.md; the first guide
        "train",
        "easyanimate-v5.1-control",
        "single",
        "--config_path config/easyanimate_video_v5.1_magvit_qwen.yaml --image_sample_size=1024 "
        "--video_sample_size=256 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=100 --learning_rate=2e-05 "
        "--lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=42 --output_dir=output_dir "
        "--adam_weight_decay=5e-3 --uniform_sampling --loss_type=flow --train_mode=control_ref "
        "--control_ref_image=first_frame --trainable_modules . ",
    ),
    (
        # README_TRAIN_CONTROL.md; the first guide
        "train",
        "easyanimate-v5.1-control",
        "zero2",
        "--config_path config/easyanimate_video_v5.1_magvit_qwen.yaml --image_sample_size=1024 "
        "--video_sample_size=256 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=100 --learning_rate=2e-05 "
        "--lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=42 --output_dir=output_dir "
        "--adam_weight_decay=5e-3 --uniform_sampling --loss_type=flow --train_mode=control_ref "
        "--control_ref_image=first_frame --use_deepspeed --trainable_modules . ",
    ),
    (
        # README_TRAIN_CONTROL.md; the first guide
        "train",
        "easyanimate-v5-control",
        "single",
        "--config_path config/easyanimate_video_v5_magvit_multi_text_encoder.yaml "
        "--image_sample_size=1024 --video_sample_size=256 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=100 --learning_rate=2e-05 "
        "--lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=42 --output_dir=output_dir "
        "--adam_weight_decay=5e-3 --loss_type=ddpm --uniform_sampling --trainable_modules . ",
    ),
    (
        # README_TRAIN_CONTROL.md; the first guide
        "train",
        "easyanimate-v5-control",
        "zero2",
        "--config_path config/easyanimate_video_v5_magvit_multi_text_encoder.yaml "
        "--image_sample_size=1024 --video_sample_size=256 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=100 --learning_rate=2e-05 "
        "--lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=42 --output_dir=output_dir "
        "--adam_weight_decay=5e-3 --loss_type=ddpm --uniform_sampling --use_deepspeed --trainable_modules "
        ". ",
    ),
    (
        # README_TRAIN_LORA.md
        "lora",
        "easyanimate-v5.1-control",
        "single",
        "--config_path config/easyanimate_video_v5.1_magvit_qwen.yaml --image_sample_size=1024 "
        "--video_sample_size=256 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=100 --learning_rate=1e-04 "
        "--seed=42 --low_vram --output_dir=output_dir --adam_weight_decay=5e-3 --loss_type=flow "
        "--uniform_sampling --train_mode=inpaint ",
    ),
    (
        # README_TRAIN_LORA.md
        "lora",
        "easyanimate-v5.1-control",
        "zero2",
        "--config_path config/easyanimate_video_v5.1_magvit_qwen.yaml --image_sample_size=1024 "
        "--video_sample_size=256 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=100 --learning_rate=1e-04 "
        "--seed=42 --low_vram --output_dir=output_dir --adam_weight_decay=5e-3 --loss_type=flow "
        "--use_deepspeed --uniform_sampling --train_mode=inpaint ",
    ),
    (
        # README_TRAIN_LORA.md
        "lora",
        "easyanimate-v5-control",
        "single",
        "--config_path config/easyanimate_video_v5_magvit_multi_text_encoder.yaml "
        "--image_sample_size=1024 --video_sample_size=256 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=100 --learning_rate=1e-04 "
        "--seed=42 --low_vram --output_dir=output_dir --adam_weight_decay=5e-3 --loss_type=ddpm "
        "--uniform_sampling --train_mode=inpaint ",
    ),
    (
        # README_TRAIN_LORA.md
        "lora",
        "easyanimate-v5-control",
        "zero2",
        "--config_path config/easyanimate_video_v5_magvit_multi_text_encoder.yaml "
        "--image_sample_size=1024 --video_sample_size=256 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=100 --learning_rate=1e-04 "
        "--seed=42 --low_vram --output_dir=output_dir --adam_weight_decay=5e-3 --loss_type=ddpm "
        "--use_deepspeed --uniform_sampling --train_mode=inpaint ",
    ),
    (
        # train_control.sh
        "train",
        "easyanimate-v5.1-control",
        "single",
        "--config_path config/easyanimate_video_v5.1_magvit_qwen.yaml --image_sample_size=1024 "
        "--video_sample_size=256 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=100 --learning_rate=2e-05 "
        "--lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=42 --output_dir=output_dir "
        "--adam_weight_decay=5e-3 --loss_type=flow --uniform_sampling --train_mode=control_ref "
        "--trainable_modules . ",
    ),
    (
        # train_lora.sh
        "lora",
        "easyanimate-v5.1-control",
        "single",
        "--config_path config/easyanimate_video_v5.1_magvit_qwen.yaml --image_sample_size=1024 "
        "--video_sample_size=256 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=100 --learning_rate=1e-04 "
        "--seed=42 --low_vram --output_dir=output_dir --adam_weight_decay=5e-2 --loss_type=flow "
        "--uniform_sampling --train_mode=inpaint ",
    ),
    (
        # the first guide
        "train",
        "wan-s2v",
        "fsdp single zero2 zero3",
        "--config_path=config/wan2.2/wan_civitai_s2v.yaml --video_sample_size=640 --token_sample_size=640 "
        "--video_sample_stride=1 --video_sample_n_frames=80 --checkpointing_steps=50 "
        "--learning_rate=2e-05 --lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=42 "
        "--output_dir=output_dir --adam_weight_decay=3e-2 --uniform_sampling --low_vram "
        "--trainable_modules . ",
    ),
    (
        # the first guide
        "train",
        "hunyuanvideo-t2v",
        "fsdp single zero2",
        "--image_sample_size=640 --video_sample_size=640 --token_sample_size=640 --video_sample_stride=2 "
        "--video_sample_n_frames=81 --video_repeat=1 --checkpointing_steps=50 --learning_rate=2e-05 "
        "--lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=42 --output_dir=output_dir2 "
        "--adam_weight_decay=3e-2 --uniform_sampling --low_vram --train_mode=normal --trainable_modules . ",
    ),
    (
        # the first guide
        "train",
        "hunyuanvideo-i2v",
        "fsdp",
        "--image_sample_size=640 --video_sample_size=640 --token_sample_size=640 --video_sample_stride=2 "
        "--video_sample_n_frames=81 --video_repeat=1 --checkpointing_steps=50 --learning_rate=2e-05 "
        "--lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=42 --output_dir=output_dir2 "
        "--adam_weight_decay=3e-2 --uniform_sampling --low_vram --train_mode=i2v --trainable_modules . ",
    ),
    (
        # the first guide
        "train",
        "wan-fun-control",
        "single",
        "--config_path=config/wan2.1/wan_civitai.yaml --image_sample_size=1024 --video_sample_size=256 "
        "--token_sample_size=512 --video_sample_stride=2 --video_sample_n_frames=81 --video_repeat=1 "
        "--checkpointing_steps=50 --learning_rate=2e-05 --lr_scheduler=constant_with_warmup "
        "--lr_warmup_steps=100 --seed=42 --output_dir=output_dir --adam_weight_decay=3e-2 "
        "--uniform_sampling --low_vram --train_mode=control_object --control_ref_image=first_frame "
        "--trainable_modules . ",
    ),
    (
        # the first guide
        "lora",
        "cogvideox-fun",
        "fsdp single zero2",
        "--image_sample_size=512 --video_sample_size=512 --token_sample_size=512 --video_sample_stride=3 "
        "--video_sample_n_frames=49 --video_repeat=1 --checkpointing_steps=50 --learning_rate=1e-04 "
        "--seed=42 --output_dir=output_dir --adam_weight_decay=3e-2 --rank=64 --network_alpha=32 "
        "--target_name=to_q,to_k,to_v,ff.0,ff.2 --use_peft_lora --low_vram --train_mode=inpaint ",
    ),
]
