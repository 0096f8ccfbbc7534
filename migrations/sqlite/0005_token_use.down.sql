-- loses: when each API token was last used
DROP TABLE api_token_use;
