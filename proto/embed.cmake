# cmake -DIN=FILE -DOUT=FILE.c -DNAME=SYMBOL -P embed.cmake: a file's bytes as `const uint8_t SYMBOL[]`, `const size_t
# SYMBOL_len`.
file(READ ${IN} bytes HEX)
string(LENGTH "${bytes}" digits)
math(EXPR n "${digits} / 2")
string(REGEX REPLACE "(..)" "0x\\1," bytes "${bytes}")
file(WRITE ${OUT} "#include <stddef.h>\n#include <stdint.h>\nextern const uint8_t ${NAME}[];\nextern const size_t \
${NAME}_len;\nconst uint8_t ${NAME}[] = {${bytes}};\nconst size_t ${NAME}_len = ${n};\n")
