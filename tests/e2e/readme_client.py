import sys
import grpc
from tandem.v1 import inference_pb2 as pb

address, prompt = sys.argv[1:3]
with grpc.insecure_channel(address) as channel:
    generate = channel.unary_stream("/tandem.v1.Inference/Generate", pb.GenerateRequest.SerializeToString,
                                    pb.GenerateResponse.FromString)
    request = pb.GenerateRequest(text=prompt, stopping=pb.Stopping(max_tokens=64))
    try:
        for message in generate(request, timeout=60):
            print(message.text, end="", flush=True)
        print(f"\n[{message.finish.usage.completion_tokens} tokens]")
    except grpc.RpcError as e:
        sys.exit(f"{e.code().name}: {e.details()}")
