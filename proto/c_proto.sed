# What protoc-c 1.4 needs changed in our .proto files; none of it changes a byte on the wire.
# 1. proto3 `optional` is not supported: write the one-field oneof that it stands for. In C: `if (m->NAME_is_case)`.
s/^\( *\)optional \([a-z0-9]*\) \([a-z_0-9]*\) = \([0-9]*\);/\1oneof \3_is { \2 \3 = \4; }/
# 2. A C string loses what follows a NUL: where users' text comes in or goes out, take length and bytes.
/^package tandem.v1;/,$ {
  s/^\( *\)string \(text\|model\|request_id\|content\|salt\|tenant\) =/\1bytes \2 =/
}
