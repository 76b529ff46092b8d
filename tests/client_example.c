#include <stdio.h>
#include <string.h>

#include "proto/tandem_client.h"

static bool print_message(void *ctx, const Tandem__V1__GenerateResponse *m)
{
    (void)ctx;
    fwrite(m->text.data, 1, m->text.len, stdout);
    if (m->finish)
        printf("\n[%u tokens]\n", m->finish->usage->completion_tokens);
    return !ferror(stdout);
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    const char *prompt = argv[2];
    struct status st = STATUS_INIT;
    struct tandem_client *client = NULL;
    struct tandem_client_options options = {
        .address = argv[1], .tls_ca = argc > 3 ? argv[3] : NULL, .token_file = argc > 4 ? argv[4] : NULL};
    enum status_code rc = tandem_client_open(&client, &options, &st);
    if (rc == ST_OK) {
        Tandem__V1__Stopping stopping = TANDEM__V1__STOPPING__INIT;
        stopping.max_tokens_is_case = TANDEM__V1__STOPPING__MAX_TOKENS_IS_MAX_TOKENS;
        stopping.max_tokens = 64;
        Tandem__V1__GenerateRequest request = TANDEM__V1__GENERATE_REQUEST__INIT;
        request.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TEXT;
        request.text = (ProtobufCBinaryData){strlen(prompt), (uint8_t *)prompt};
        request.stopping = &stopping;
        rc = tandem_client_generate(client, &request, 60000, print_message, NULL, &st);
    }
    tandem_client_close(client);
    if (rc != ST_OK)
        fprintf(stderr, "%s: %s\n", status_name(rc), st.message);
    return rc != ST_OK;
}
