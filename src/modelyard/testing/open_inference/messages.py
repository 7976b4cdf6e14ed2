"""The protocol's gRPC messages, built from the table below in a pool of their own.

So the suite depends on nobody's generated code, and may live in one process with tritonclient or kserve, which register
messages of the same names. Field numbers are those of open_inference_grpc.proto and, for the extensions, grpc_service.proto.
"""

import re
from functools import cache
from typing import Any

_TABLE = """
ServerLiveRequest
ServerLiveResponse          bool live 1
ServerReadyRequest
ServerReadyResponse         bool ready 1
ModelReadyRequest           string name 1; string version 2
ModelReadyResponse          bool ready 1
ServerMetadataRequest
ServerMetadataResponse      string name 1; string version 2; string* extensions 3
ModelMetadataRequest        string name 1; string version 2
ModelMetadataResponse       string name 1; string* versions 2; string platform 3; TensorMetadata* inputs 4;
                            TensorMetadata* outputs 5
TensorMetadata              string name 1; string datatype 2; int64* shape 3

InferParameter              bool? bool_param 1; int64? int64_param 2; string? string_param 3; double? double_param 4;
                            uint64? uint64_param 5
InferParameterEntry         string key 1; InferParameter value 2
InferTensorContents         bool* bool_contents 1; int32* int_contents 2; int64* int64_contents 3; uint32* uint_contents 4;
                            uint64* uint64_contents 5; float* fp32_contents 6; double* fp64_contents 7; bytes* bytes_contents 8
InferInputTensor            string name 1; string datatype 2; int64* shape 3; InferParameterEntry* parameters 4;
                            InferTensorContents contents 5
InferRequestedOutputTensor  string name 1; InferParameterEntry* parameters 2
ModelInferRequest           string model_name 1; string model_version 2; string id 3; InferParameterEntry* parameters 4;
                            InferInputTensor* inputs 5; InferRequestedOutputTensor* outputs 6; bytes* raw_input_contents 7
InferOutputTensor           string name 1; string datatype 2; int64* shape 3; InferParameterEntry* parameters 4;
                            InferTensorContents contents 5
ModelInferResponse          string model_name 1; string model_version 2; string id 3; InferParameterEntry* parameters 4;
                            InferOutputTensor* outputs 5; bytes* raw_output_contents 6
ModelStreamInferResponse    string error_message 1; ModelInferResponse infer_response 2

ModelStatisticsRequest      string name 1; string version 2
ModelStatisticsResponse     ModelStatistics* model_stats 1
ModelStatistics             string name 1; string version 2; uint64 last_inference 3; uint64 inference_count 4;
                            uint64 execution_count 5; InferStatistics inference_stats 6
InferStatistics             StatisticDuration success 1; StatisticDuration fail 2
StatisticDuration           uint64 count 1; uint64 ns 2
RepositoryIndexRequest      string repository_name 1; bool ready 2
RepositoryIndexResponse     ModelIndex* models 1
ModelIndex                  string name 1; string version 2; string state 3; string reason 4
LogSettingsRequest
LogSettingsResponse         LogSettingEntry* settings 1
LogSettingEntry             string key 1; LogSetting value 2
LogSetting                  bool? bool_param 1; uint32? uint32_param 2; string? string_param 3
TraceSettingRequest         string model_name 2
TraceSettingResponse        TraceSettingEntry* settings 1
TraceSettingEntry           string key 1; TraceSetting value 2
TraceSetting                string* value 1
HealthCheckRequest          string service 1
HealthCheckResponse         uint32 status 1
"""
"""A message and its fields: type, name and number; * is repeated, ? one of several (a field with presence).

A map travels as a repeated pair of key and value, and an enumeration as a whole number: so they are written here.
"""


@cache
def message(name: str) -> Any:
    """Return the class of a message."""
    from google.protobuf import message_factory

    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"inference.{name}"))


@cache
def _pool() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="open_inference.proto", package="inference", syntax="proto3")
    for line in filter(None, re.sub(r";\n +", "; ", _TABLE).split("\n")):
        name, _, fields = line.partition(" ")
        made = file.message_type.add(name=name)
        for text in filter(None, (part.strip() for part in fields.split(";"))):
            kind, field, number = text.split()
            added = made.field.add(name=field, number=int(number), label=kinds.LABEL_OPTIONAL)
            if kind.endswith("*"):
                added.label = kinds.LABEL_REPEATED
            if kind.endswith("?"):
                added.proto3_optional, added.oneof_index = True, len(made.oneof_decl)
                made.oneof_decl.add(name=f"_{field}")
            kind = kind.rstrip("*?")
            if kind[0].isupper():
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".inference.{kind}"
            else:
                added.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool
